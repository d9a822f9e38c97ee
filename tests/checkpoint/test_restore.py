"""A checkpoint is whole or does not exist, and any number of ranks reads what any other number wrote."""

import os
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from minka.checkpoint import async_saver as saver
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import restore, whole_tensors
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import Layout
from ranks import on_ranks
from saved import ALONE, save, silent, tensors


def test_what_was_saved_is_restored_bitwise_with_its_state(tmp_path: Path) -> None:
    saved = tensors(1)
    save(tmp_path, 3, saved, {"step": 3}, ALONE)
    read = tensors(2)
    assert restore(tmp_path, read, ALONE, silent) == {"step": 3}
    for name, piece in saved.items():
        assert torch.equal(piece.local, read[name].local), name


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"step": 1}, ALONE)
    newest = save(tmp_path, 2, tensors(2), {"step": 2}, ALONE).path
    file = newest / ("manifest.json" if damage == "manifest" else "rank-00000.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
    file.write_bytes(content[:-8] if damage in ("cut", "manifest") else content)
    if damage == "gone":
        file.unlink()
    passed: list[Path] = []
    read = tensors(9)
    assert restore(tmp_path, read, ALONE, lambda path, reason: passed.append(path)) == {"step": 1}
    assert passed == [newest]
    assert torch.equal(read["model.w"].local, tensors(1)["model.w"].local)


def test_a_step_without_a_manifest_is_passed_over_and_named(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"step": 1}, ALONE)
    newest = save(tmp_path, 2, tensors(2), {"step": 2}, ALONE).path
    (newest / "manifest.json").unlink()
    passed: list[Path] = []
    assert restore(tmp_path, tensors(), ALONE, lambda path, reason: passed.append(path)) == {"step": 1}
    assert passed == [newest]


@pytest.mark.parametrize("lost", ["rank-00000.safetensors", "manifest.json"])
def test_no_whole_checkpoint_needs_a_person(lost: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {}, ALONE).path
    (path / lost).unlink()
    with pytest.raises(UserError) as caught:
        restore(tmp_path, tensors(), ALONE, lambda path, reason: None)
    assert caught.value.status == ExitStatus.NEEDS_PERSON


def test_a_save_that_fails_leaves_nothing_and_keeps_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"step": 1}, ALONE)
    assert on_ranks(save_too_much, 2, str(tmp_path)) == [True, True]  # rank 1 could write, and must hear of rank 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert restore(tmp_path, tensors(), ALONE, silent) == {"step": 1}


def test_a_save_sweeps_what_attempts_of_any_step_left(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {"step": 1}, ALONE).path
    for name in (".step-00000002.saving-1f3a", ".step-00000001.deleting", ".step-00000007.deleting"):
        shutil.copytree(path, tmp_path / name)
    save(tmp_path, 1, tensors(2), {"step": 1, "again": True}, ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert restore(tmp_path, tensors(), ALONE, silent) == {"step": 1, "again": True}


def test_a_replacement_that_fails_keeps_the_checkpoint_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, tensors(1), {"old": True}, ALONE)

    rename = os.rename

    def refusing(source: Path, target: Path) -> None:
        if ".saving-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "rename", refusing)
        save(tmp_path, 1, tensors(2), {"old": False}, ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert restore(tmp_path, tensors(), ALONE, silent) == {"old": True}


def test_files_and_their_folder_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_sync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        done.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(tmp_path, 1, tensors(), {}, ALONE)
    assert {"rank-00000.safetensors", "manifest.json"} < set(done)
    assert re.fullmatch(r"\.step-00000001\.saving-[0-9a-f]+", done[-3])
    assert done[-2:] == ["-> step-00000001", tmp_path.name]


def test_long_saves_and_restores_keep_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "CHUNK_BYTES", 64)
    beats: list[str] = []
    path = save(tmp_path, 1, tensors(), {}, ALONE, alive=lambda: beats.append("save")).path
    chunks = -(-(path / "rank-00000.safetensors").stat().st_size // 64)
    restore(tmp_path, tensors(), ALONE, silent, alive=lambda: beats.append("restore"))
    list(whole_tensors(path, "model.", alive=lambda: beats.append("whole")))
    assert chunks > 3
    assert beats.count("save") == 2 * chunks  # hashed, and written
    assert min(beats.count("restore"), beats.count("whole")) >= chunks


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(writers: int, readers: int, tmp_path: Path) -> None:
    on_ranks(write_sharded, writers, str(tmp_path))
    parts = on_ranks(read_sharded, readers, str(tmp_path))
    assert np.array_equal(np.concatenate([part for part in parts if part.size]), reference())
    whole = dict(whole_tensors(checkpoints(tmp_path)[0], "model."))
    assert np.array_equal(whole["w"].numpy(), reference())


def test_an_unfinished_save_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {"step": 1}, ALONE).path
    shutil.copytree(path, tmp_path / ".step-00000002.saving-1f3a")
    assert checkpoints(tmp_path) == [path]
    save(tmp_path, 2, tensors(2), {"step": 2}, ALONE)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def save_too_much(folder: str) -> bool:
    """Whether a save raises OSError where the system lets rank 0 write no file of more than 64 KiB."""
    with start_mesh(Layout()) as mesh:
        if mesh.rank == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        large = {"model.w": Piece(torch.randn(64, 1024), (64 * mesh.rank, 0), (128, 1024))}
        try:
            save(Path(folder), 2, large, {"step": 2}, mesh)
        except OSError:
            return True
        return False


def reference() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Seven rows: no number of ranks above one divides them."""
    return np.arange(21, dtype=np.float32).reshape(7, 3)


def rows_of(mesh: Mesh) -> Piece:
    """This rank's rows, as torch.chunk cuts them; empty on ranks that have none."""
    each = -(-7 // mesh.ranks)
    first = min(7, each * mesh.rank)
    local = torch.from_numpy(reference())[first : min(7, first + each)].clone()
    return Piece(local, (first, 0), (7, 3))


def write_sharded(folder: str) -> None:
    with start_mesh(Layout()) as mesh:
        save(Path(folder), 1, {"model.w": rows_of(mesh)}, {}, mesh)


def read_sharded(folder: str) -> object:
    with start_mesh(Layout()) as mesh:
        piece = rows_of(mesh)
        piece.local.fill_(-1)
        restore(Path(folder), {"model.w": piece}, mesh, silent)
        return piece.local.numpy().copy()
