"""Every file of a store, damaged in every way: each reader names the file, or shows what it showed before."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minka.data.command import main
from minka.data.prepare import open_or_prepare, store_folder
from minka.data.verify import checked_split
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.run_folder import RunFolder
from saved import saved_run
from tiny import corpus, tiny

FILES = [f"{split}.{part}" for split in ("train", "validation") for part in ("bin", "idx", "parquet")]
FILES += ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "manifest.json"]


def flip(file: Path, other: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


def cut(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def delete(file: Path, other: Path) -> None:
    file.unlink()


def directory(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def swap(file: Path, other: Path) -> None:
    """Two files of the store change places: those of the splits, or those of the tokenizer."""
    partner = {"train": "validation", "validation": "train", "tokenizer": "tokenizer_config", "manifest": "train"}
    pair = file.with_name(partner.get(file.stem, "tokenizer") + (".bin" if file.stem == "manifest" else file.suffix))
    moved = file.read_bytes()
    shutil.copyfile(pair, file)
    pair.write_bytes(moved)


def foreign(file: Path, other: Path) -> None:
    """The same file of a different store."""
    shutil.copyfile(
        other / file.parent.name / file.name if file.parent.name == "tokenizer" else other / file.name, file
    )


DAMAGES = [flip, cut, empty, delete, directory, swap, foreign]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with its store, a copy of it, and a store of a different corpus and vocabulary."""
    folder = tmp_path_factory.mktemp("made")
    data, model = {"tokenizer": "bpe"}, {"vocab": 300}
    saved_run(folder, data=data, model=model)
    shutil.copytree(folder / "store", folder / "intact")
    corpus(folder / "other" / "corpus", documents=61, seed=2)
    open_or_prepare(tiny(folder / "other", data=data, model=model), folder)
    return tiny(folder, data=data, model=model)


@pytest.fixture
def store(made: RunConfig) -> Iterator[Path]:
    """The run's store, whole again afterwards."""
    folder = Path(made.data.store)
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "intact", folder)


def readers(config: RunConfig) -> dict[str, Callable[[], object]]:
    """What the commands do that read a store."""
    folder, run = store_folder(config, Path()), RunFolder.of(config)

    def start() -> object:
        store = open_or_prepare(config, Path())
        run.check_data(store.folder, store.hash)
        split = checked_split(store, "validation")
        return [store.hash, split.text_of(0), split.document_bytes.tolist(), split.source_of(0)]

    def inspect(*arguments: str) -> Callable[[], object]:
        return lambda: main(["inspect", str(run.path), *arguments, "--json"])

    return {
        "start": start,
        "inspect": inspect(),
        "a document": inspect("--document", "0"),
        "validation": inspect("--document", "1", "--split", "validation"),
        "a sample": inspect("--sample", "3"),
        "verify": lambda: main(["verify", str(folder), "--json"]),
    }


def answers(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each reader says."""
    found = {}
    for reader, read in readers(config).items():
        try:
            found[reader] = str(read())
        except UserError as error:
            found[reader] = f"refused: {error}"
        printed = capsys.readouterr()
        found[reader] += printed.out + printed.err
    return found


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_or_harmless(
    name: str,
    damage: Callable[[Path, Path], None],
    made: RunConfig,
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = answers(made, capsys)
    assert not [said for said in before.values() if "refused" in said or '"error"' in said]
    damage(store / name, store.parent / "other" / "store")
    after = answers(made, capsys)
    harmless = {reader for reader, said in after.items() if said == before[reader]}
    for reader in after.keys() - harmless:
        said = after[reader]
        assert said.startswith("refused: ") or '"error"' in said, (reader, said)
        assert Path(name).name in said or (name == "manifest.json" and str(store) in said), (reader, said)
    same = (store / name).is_file() and (store / name).read_bytes() == (store.parent / "intact" / name).read_bytes()
    assert "verify" not in harmless or same
    assert "start" not in harmless or same or name.startswith("train.")
