"""Preparing: documents are split by their content alone, and a store appears whole or not at all."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corpora import data_section, run_config, texts, write_jsonl
from minka.data import prepare as prepare_module
from minka.data import validation_split
from minka.data.document import content_hash
from minka.data.prepare import check_store, open_or_prepare, prepare, store_folder
from minka.data.read_documents import read_documents
from minka.data.store_manifest import SPLITS
from minka.data.token_store import TokenStore
from minka.data.tokenizer import train_bpe
from minka.data.validation_split import survey_corpus
from minka.data.verify import verify
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.run_folder import RunFolder
from tiny import tiny


def jsonl(path: Path, *given: str) -> list[str]:
    """data.paths of a file with these documents."""
    return [str(write_jsonl(path, [{"text": text} for text in given]))]


def split_texts(store: TokenStore) -> dict[str, list[str]]:
    """The texts of both splits."""
    return {
        name: [split.text_of(i) for i in range(split.n_documents)]
        for name, split in ((name, store.split(name)) for name in SPLITS)
    }


def prepared(folder: Path, **fields: Any) -> TokenStore:
    """A store of plain bytes."""
    prepare(data_section(**fields), 256, folder)
    return TokenStore.open(folder)


def test_the_split_of_a_document_follows_from_its_content_alone(tmp_path: Path) -> None:
    given = texts(300)
    one = split_texts(
        prepared(tmp_path / "1", source="jsonl", paths=jsonl(tmp_path / "a.jsonl", *given), validation_fraction=0.2)
    )
    mixed = [*reversed(given), *texts(50, seed=9)]
    other = split_texts(
        prepared(tmp_path / "2", source="jsonl", paths=jsonl(tmp_path / "b.jsonl", *mixed), validation_fraction=0.2)
    )
    for name in SPLITS:
        assert set(one[name]) == set(other[name]) & set(given)
    cutoff = int(0.2 * 2**64)
    assert set(one["validation"]) == {t for t in given if int.from_bytes(content_hash(t.encode())[:8]) < cutoff}
    assert 30 < len(one["validation"]) < 90  # 60 are expected; these bounds are four standard deviations


def test_exact_duplicates_are_in_the_same_split(tmp_path: Path) -> None:
    given = texts(100) * 2
    both = split_texts(
        prepared(tmp_path / "s", source="jsonl", paths=jsonl(tmp_path / "a.jsonl", *given), validation_fraction=0.3)
    )
    assert not set(both["train"]) & set(both["validation"])
    assert sorted(both["train"] + both["validation"]) == sorted(given)


def test_different_data_for_a_run_that_exists_are_those_of_a_new_run(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    store = open_or_prepare(config, tmp_path)
    other = tiny(tmp_path, data={"validation_fraction": 0.3})
    for exists in (False, True):
        with pytest.raises(UserError, match="made with different settings") as caught:
            check_store(store, other)
        assert ("run.name=NEW" in caught.value.remedy) == exists
        RunFolder.of(config).path.mkdir(parents=True, exist_ok=True)
        RunFolder.of(config).config_file.touch()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_split_of_a_small_corpus_is_empty_and_the_manifest_says_so(fraction: float, tmp_path: Path) -> None:
    paths = jsonl(tmp_path / "a.jsonl", "one", "two", "three")
    store = prepared(tmp_path / "s", source="jsonl", paths=paths, validation_fraction=fraction)
    by_hash = sorted(["one", "two", "three"], key=lambda text: content_hash(text.encode()))
    both = split_texts(store)
    alone = "validation" if fraction < 0.5 else "train"
    assert both[alone] == [by_hash[0] if fraction < 0.5 else by_hash[-1]]
    assert "content hash" in store.manifest.moved


def test_a_tokenizer_sees_the_training_split_only(tmp_path: Path) -> None:
    given = texts(80)
    fields = {"source": "jsonl", "paths": jsonl(tmp_path / "a.jsonl", *given), "validation_fraction": 0.5}
    prepare(data_section(**fields, tokenizer="bpe"), 300, tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    train = [text for text in given if text in set(split_texts(store)["train"])]
    alone = train_bpe([text.encode() for text in train], 300)
    assert store.tokenizer.backend.to_str() == alone.backend.to_str()
    everything = train_bpe([text.encode() for text in given], 300)
    assert everything.backend.to_str() != alone.backend.to_str()


def test_the_sample_a_tokenizer_is_trained_on_is_bounded_and_does_not_depend_on_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_split, "SAMPLE_BYTES", 3_000)
    given = texts(400)
    found = []
    for i, order in enumerate((given, given[::-1])):
        section = data_section(source="jsonl", paths=jsonl(tmp_path / f"{i}.jsonl", *order), tokenizer="bpe")
        found.append(survey_corpus(section, lambda n: None).sample)
    assert 2_000 < sum(map(len, found[0])) <= 3_000
    assert sorted(found[0]) == sorted(found[1])


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_preparing_twice_gives_the_same_bytes(tokenizer: str, corpus: Path, tmp_path: Path) -> None:
    vocab = 256 if tokenizer == "bytes" else 280
    for name in "ab":
        prepare(data_section(source="jsonl", paths=[str(corpus)], tokenizer=tokenizer), vocab, tmp_path / name)
    assert TokenStore.open(tmp_path / "a").hash == TokenStore.open(tmp_path / "b").hash


def test_groups_do_not_change_what_is_written(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = data_section(source="jsonl", paths=[str(corpus)])
    prepare(section, 256, tmp_path / "a")
    monkeypatch.setattr(prepare_module, "ENCODE_BYTES", 100)
    monkeypatch.setattr(prepare_module, "ENCODE_DOCUMENTS", 3)
    prepare(section, 256, tmp_path / "b")
    assert TokenStore.open(tmp_path / "a").hash == TokenStore.open(tmp_path / "b").hash


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    store = prepared(tmp_path / "s", source="jsonl", paths=jsonl(tmp_path / "a.jsonl", "", "one", "", "two"))
    assert store.manifest.empty == 2
    assert sum(part.documents for part in store.manifest.splits.values()) == 2


def test_progress_covers_the_corpus(corpus: Path, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}

    @contextmanager
    def note(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
        yield seen.setdefault(f"{what} {total}", []).append

    section = data_section(source="jsonl", paths=[str(corpus)])
    prepare(section, 256, tmp_path / "s", note)
    size = sum(len(item.raw) for item in read_documents(section))
    assert {what: sum(parts) for what, parts in seen.items()} == {
        "reading the corpus None": size,
        f"tokenizing {size}": size,
    }


def test_the_stores_name_follows_from_what_defines_its_tokens(tmp_path: Path) -> None:
    def name(**data: Any) -> Path:
        return store_folder(run_config(data={"tokenizer": "bytes", "seq_len": 8, "batch_tokens": 32} | data), tmp_path)

    assert name() == name(seq_len=16, batch_tokens=64, dropped_samples=[[0, 1]])
    others = [name(), name(max_bytes=5), name(validation_fraction=0.5), name(source="text", paths=["x"])]
    assert len(set(others)) == 4
    assert name().parent == tmp_path / "stores"
    assert name().name.startswith("stdlib-")
    assert len(name().name) == len("stdlib-") + 12
    assert name(store="mine") == tmp_path / "mine"
    assert name(store="/else/where") == Path("/else/where")


def test_a_missing_store_is_prepared_once_and_then_opened(corpus: Path, tmp_path: Path) -> None:
    data = {"source": "jsonl", "paths": [str(corpus)], "tokenizer": "bytes", "seq_len": 8, "batch_tokens": 32}
    config = run_config(data=data)
    first = open_or_prepare(config, tmp_path)
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    second = open_or_prepare(config, tmp_path)
    assert second.folder == first.folder == store_folder(config, tmp_path)
    assert (second.folder / "train.bin").stat().st_mtime_ns == stamp
    assert os.listdir(tmp_path / "stores") == [first.folder.name]  # no temporary folder remains


def open_together(barrier: Any, folder: Path, section: dict[str, Any], found: Any) -> None:
    """What each of several processes does at the same moment."""
    barrier.wait()
    found.put(open_or_prepare(run_config(data=section), folder).hash)


def test_processes_that_prepare_at_once_end_with_one_whole_store(corpus: Path, tmp_path: Path) -> None:
    section = {"source": "jsonl", "paths": [str(corpus)], "tokenizer": "bytes", "seq_len": 8, "batch_tokens": 32}
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.SimpleQueue()
    workers = [context.Process(target=open_together, args=(barrier, tmp_path, section, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len({found.get() for _ in workers}) == 1
    (folder,) = (tmp_path / "stores").iterdir()
    assert verify(folder)["ok"]


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_an_interrupted_prepare_leaves_nothing(
    when: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "survey_corpus" if when == "reading" else "hash_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_section(source="jsonl", paths=[str(corpus)]), 256, tmp_path / "new" / "deep" / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_changes_between_the_readings_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    paths = jsonl(file, *texts(10))

    def changing(data: DataSection, advance: Callable[[int], None]) -> object:
        found = survey_corpus(data, advance)
        jsonl(file, *texts(11))
        return found

    monkeypatch.setattr(prepare_module, "survey_corpus", changing)
    with pytest.raises(UserError) as caught:
        prepare(data_section(source="jsonl", paths=paths), 256, tmp_path / "store")
    assert caught.value.where == "data.source=jsonl"
    assert not (tmp_path / "store").exists()
