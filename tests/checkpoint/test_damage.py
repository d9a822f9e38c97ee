"""Whatever happens to the files of a checkpoint is found and named, and the one before is taken."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minka.checkpoint.manifest import Damage, read_header
from minka.checkpoint.restore import restore, restore_from, whole_tensors
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import Layout
from ranks import on_ranks
from saved import ALONE, save

FLIPS = 500
ROWS = 6
SHARDS = ["rank-00000.safetensors", "rank-00001.safetensors"]
TABLES = ["rank-00000.json", "rank-00001.json"]
FILES = [*SHARDS, *TABLES, "index.json", "manifest.json"]


def pieces(ranks: int = 1, rank: int = 0, value: float = -1.0) -> dict[str, Piece]:
    """A matrix cut by rows, a vector of another type, and a scalar that all ranks have."""
    import torch

    each = ROWS // ranks
    cut = {"model.w": (ROWS, 5), "moments.w": (ROWS, 3)}
    made = {
        name: Piece(torch.full((each, shape[1]), value + i), (each * rank, 0), shape)
        for i, (name, shape) in enumerate(cut.items())
    }
    half = torch.full((each,), value, dtype=torch.bfloat16)
    return made | {"model.half": Piece(half, (each * rank,), (ROWS,)), "count": piece_of(torch.tensor(value))}


def write_steps(folder: str) -> None:
    """Checkpoints of steps 1, 2 and 3, full of their step, and in another run one of step 3."""
    with start_mesh(Layout()) as mesh:
        for step in (1, 2, 3):
            state = {"step": step, "eps": 1e-08}  # 1E-08 is the same number
            save(Path(folder) / "run", step, pieces(mesh.ranks, mesh.rank, float(step)), state, mesh)
        save(Path(folder) / "other", 3, pieces(mesh.ranks, mesh.rank, 33.0), {"step": 3}, mesh)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two ranks; copied, never changed."""
    folder = tmp_path_factory.mktemp("written")
    on_ranks(write_steps, 2, str(folder))
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written / "run", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restored(folder: Path) -> tuple[int, list[tuple[str, str]]]:
    """The step that one rank restores, checked number by number, and what was passed over with the reasons."""
    passed: list[tuple[str, str]] = []
    read = pieces()
    state = restore(folder, read, ALONE, lambda path, reason: passed.append((path.name, reason)))
    for name, piece in pieces(value=float(state["step"])).items():
        assert bool((read[name].local == piece.local).all()), name
    return int(state["step"]), passed


def flip(file: Path, at: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def test_an_undamaged_one_is_read_without_a_word(run: Path) -> None:
    assert restored(run) == (3, [])


def test_every_random_flip_is_found_named_and_fallen_back_from(run: Path) -> None:
    dice, found = random.Random(0), 0
    newest = run / "step-00000003"
    sizes = {name: (newest / name).stat().st_size for name in FILES}
    for _ in range(FLIPS):
        name = dice.choice(FILES)
        at, bit = dice.randrange(sizes[name]), dice.randrange(8)
        flip(newest / name, at, bit)
        step, passed = restored(run)
        assert (step, [path for path, _ in passed]) == (2, ["step-00000003"]), (name, at, bit)
        assert name in passed[0][1], passed
        aside = run / "step-00000003.damaged-1"
        flip(aside / name, at, bit)
        aside.rename(newest)
        found += 1
    assert found == FLIPS
    assert restored(run) == (3, [])


@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_byte_is_found(name: str, run: Path) -> None:
    """Every byte there is, header, padding and last byte too, by what one rank reads."""
    path = run / "step-00000003"
    original = (path / name).read_bytes()
    for at in range(len(original)):
        flip(path / name, at, 5 if original[at : at + 1].isalpha() else at % 8)  # 5: a to A
        with pytest.raises(UserError, match=name):
            restore_from(path, pieces(), ALONE)
        (path / name).write_bytes(original)
    restore_from(path, pieces(), ALONE)


def other_step(path: Path) -> Path:
    return path.parent / "step-00000002"


def swap(path: Path, names: list[str]) -> None:
    a, b = (path / name for name in names)
    a.rename(path / "between")
    b.rename(a)
    (path / "between").rename(b)


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def folder_for_a_file(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a shard cut by a byte": (SHARDS[1], lambda path, _: os.truncate(path / SHARDS[1], 100)),
    "an empty shard": (SHARDS[1], lambda path, _: os.truncate(path / SHARDS[1], 0)),
    "a longer shard": (SHARDS[0], lambda path, _: os.truncate(path / SHARDS[0], 5000)),
    "a cut manifest": ("manifest.json", lambda path, _: os.truncate(path / "manifest.json", 100)),
    "an empty manifest": ("manifest.json", lambda path, _: os.truncate(path / "manifest.json", 0)),
    "a cut table": (TABLES[1], lambda path, _: os.truncate(path / TABLES[1], 50)),
    "no table": (TABLES[1], lambda path, _: os.remove(path / TABLES[1])),
    "two tables exchanged": ("rank-0000", lambda path, _: swap(path, TABLES)),
    "a table of another run": (TABLES[1], lambda path, other: shutil.copy(other / path.name / TABLES[1], path)),
    "a folder for a table": (TABLES[0], lambda path, _: folder_for_a_file(path / TABLES[0])),
    "a cut index": ("index.json", lambda path, _: os.truncate(path / "index.json", 100)),
    "no index": ("index.json", lambda path, _: os.remove(path / "index.json")),
    "an index of another run": ("index.json", lambda path, other: shutil.copy(other / path.name / "index.json", path)),
    "no shard": (SHARDS[1], lambda path, _: os.remove(path / SHARDS[1])),
    "no manifest": ("manifest.json", lambda path, _: os.remove(path / "manifest.json")),
    "an empty folder": ("manifest.json", lambda path, _: empty(path)),
    "two shards exchanged": ("rank-0000", lambda path, _: swap(path, SHARDS)),
    "a shard twice": (SHARDS[1], lambda path, _: shutil.copy(path / SHARDS[0], path / SHARDS[1])),
    "a shard of another step": (SHARDS[0], lambda path, _: shutil.copy(other_step(path) / SHARDS[0], path)),
    "a shard of another run": (SHARDS[1], lambda path, other: shutil.copy(other / path.name / SHARDS[1], path)),
    "a manifest of another step": ("manifest", lambda path, _: shutil.copy(other_step(path) / "manifest.json", path)),
    "a manifest of another run": (
        "index.json",
        lambda path, other: shutil.copy(other / path.name / "manifest.json", path),
    ),
    "all files of another step": (
        "manifest.json",
        lambda path, _: shutil.copytree(other_step(path), path, dirs_exist_ok=True),
    ),
    "one shard too many": (
        "rank-00002",
        lambda path, _: shutil.copy(path / SHARDS[0], path / "rank-00002.safetensors"),
    ),
    "a file too many": ("notes.txt", lambda path, _: (path / "notes.txt").write_text("mine")),
    "a folder too many": ("copy", lambda path, _: shutil.copytree(other_step(path), path / "copy")),
    "zeros in the middle": (SHARDS[0], lambda path, _: _overwrite(path / SHARDS[0], 300, bytes(64))),
    "a folder for a shard": (SHARDS[0], lambda path, _: folder_for_a_file(path / SHARDS[0])),
}


def _overwrite(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_set_aside(damage: str, run: Path, written: Path) -> None:
    named, spoil = DAMAGES[damage]
    spoil(run / "step-00000003", written / "other")
    step, passed = restored(run)
    assert step == 2
    assert [path for path, _ in passed] == ["step-00000003"]
    assert named in passed[0][1]
    assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000002", "step-00000003.damaged-1"]
    assert restored(run) == (2, [])  # and is not looked at again


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_export_of_a_damaged_one_names_the_file(damage: str, run: Path, written: Path) -> None:
    """It reads the model's tensors only, one at a time, and must find the same."""
    named, spoil = DAMAGES[damage]
    spoil(run / "step-00000003", written / "other")
    with pytest.raises((OSError, Damage), match=named):
        list(whole_tensors(run / "step-00000003", ""))


def test_two_newest_damaged_is_the_third(run: Path) -> None:
    flip(run / "step-00000003" / SHARDS[0], -1, 0)
    flip(run / "step-00000002" / "manifest.json", 50, 0)
    step, passed = restored(run)
    assert step == 1
    assert [path for path, _ in passed] == ["step-00000002", "step-00000003"]  # what cannot be read is tried first
    assert sorted(path.name for path in run.iterdir()) == [
        "step-00000001",
        "step-00000002.damaged-1",
        "step-00000003.damaged-1",
    ]


def test_damaged_again_is_set_aside_beside_the_first(run: Path) -> None:
    for number in (1, 2):
        flip(run / "step-00000003" / SHARDS[0], -1, 0)
        restored(run)
        assert (run / f"step-00000003.damaged-{number}").is_dir()
        save(run, 3, pieces(value=3.0), {"step": 3}, ALONE)
    assert restored(run) == (3, [])


def test_all_damaged_needs_a_person_names_each_and_changes_nothing(run: Path) -> None:
    for path in run.iterdir():
        flip(path / SHARDS[1], -1, 3)
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError) as caught:
        restored(run)
    assert caught.value.status == ExitStatus.NEEDS_PERSON
    for step in (1, 2, 3):
        assert f"step-0000000{step}/{SHARDS[1]}" in str(caught.value)
    assert sorted(run.rglob("*")) == before


def read_on_rank(folder: str) -> list[str]:
    with start_mesh(Layout()) as mesh:
        passed: list[str] = []
        read = pieces(mesh.ranks, mesh.rank)
        state = restore(Path(folder), read, mesh, lambda path, reason: passed.append(reason))
        assert bool((read["model.w"].local == float(state["step"])).all())
        return [str(state["step"]), *passed]


def test_what_only_another_rank_reads_is_named_by_the_first(run: Path) -> None:
    """The ledger is rank 0's."""
    flip(run / "step-00000003" / SHARDS[1], -1, 0)
    reasons = on_ranks(read_on_rank, 2, str(run))
    assert [words[0] for words in reasons] == ["2", "2"]
    assert all(SHARDS[1] in words[1] for words in reasons)
    assert reasons[0][1].startswith("rank 1: ")


def test_another_model_is_refused_and_nothing_is_set_aside(run: Path) -> None:
    wider = pieces()
    wider["model.w"] = wider["model.w"]._replace(global_shape=(ROWS, 6))
    with pytest.raises(UserError, match=r"model\.w is \[6, 5\]"):
        restore(run, wider, ALONE, lambda path, reason: None)
    assert len(list(run.iterdir())) == 3


def test_the_seal_of_a_manifest_is_over_every_value(run: Path) -> None:
    """Not only over the bytes: a value that was changed and written anew as JSON is found by the hash."""
    file = run / "step-00000003" / "manifest.json"
    manifest = json.loads(file.read_text())
    for key in manifest.keys() - {"sha256"}:
        file.write_text(file.read_text())
        changed = dict(manifest)
        changed[key] = "changed"
        file.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in changed.items()) + "\n}\n")
        with pytest.raises(Damage, match=r"manifest\.json"):
            read_header(file.parent)
