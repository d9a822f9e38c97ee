"""Checkpoints that are whole or do not exist, written and read as pieces, for any layout and any number of ranks.

    checkpoints/step-00000500/rank-00000.safetensors   the pieces that rank 0 holds first
                              rank-00000.json          where each piece lies in its global tensor; hashes of the file
                              ...
                              manifest.json            all of that, and the run's state; written last (manifest.py)

A save goes to a hidden folder and one rename makes it a checkpoint. A restore checks the hashes of every file it reads
and takes the one before when one does not hold. One run has one writer, so whatever is hidden when a save begins is a
leftover of an attempt that was cut off. Tensors are safetensors and state is JSON: nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minka.parallel.manifest import NAME, check_hashes, hash_chunks, load_manifest, seal
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.parallel.shelf import checkpoints, grave_of, prune, step_name, steps_of
from minka.plan.errors import ExitStatus, UserError
from minka.plan.writing import write_json

__all__ = ["checkpoints", "load_manifest", "prune"]  # of the files beside this one, for those who train

DAMAGE = (OSError, ValueError, KeyError, SafetensorError)  # what reading a damaged checkpoint raises


class Saved(NamedTuple):
    """What a save wrote."""

    path: Path
    bytes: int


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Piece],
    state: Mapping[str, object],
    mesh: Mesh,
    *,
    alive: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a checkpoint of all ranks' pieces. Collective. Raises OSError on every rank when any rank could not write.

    `folder` is the run's checkpoints folder; nothing of a failed save stays. `alive` is called for each chunk hashed.
    """
    final, temporary = folder / step_name(step), folder / f".{step_name(step)}.saving"

    def begin() -> None:
        if mesh.is_first:
            for leftover in (*folder.glob(".step-*.saving"), *folder.glob(".step-*.deleting")):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)

    problem = _everywhere(mesh, begin)
    problem = problem or _everywhere(mesh, lambda: _write_rank(temporary, mesh.rank, tensors, alive))
    if not problem:
        problem = _everywhere(mesh, lambda: _commit(temporary, final, step, state) if mesh.is_first else None)
    if problem:
        if mesh.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(problem.errno, problem.strerror, str(final))
    size = sum(file.stat().st_size for file in final.iterdir())
    return Saved(final, size)


def restore(
    folder: Path,
    tensors: Mapping[str, Piece],
    mesh: Mesh,
    note: Callable[[Path, str], None],
    *,
    alive: Callable[[], None] = lambda: None,
) -> Any:
    """Fill `tensors` from the newest whole checkpoint and give its state, or None when there is no checkpoint.

    Collective. `note(path, reason)` is told of each checkpoint passed over because it is damaged; `alive` is called
    for each chunk hashed. Raises UserError when there are checkpoints and none of them is whole.
    """
    steps = _agreed(mesh, sorted(steps_of(folder), reverse=True))
    for path in [folder / step_name(step) for step in steps]:
        read, state, problem = None, None, ""
        try:
            read, state = _read(path, tensors, alive)
        except DAMAGE as error:
            problem = str(error) or type(error).__name__
        if not any(mesh.sum_on_host([bool(problem)])):  # all ranks or none
            assert read is not None
            _put(read, tensors)
            return state
        note(path, problem or "damaged on another rank")
    if steps:
        raise UserError(
            "none of the checkpoints is whole",
            where=str(folder),
            why="every one failed the check of its hashes, or lacks a file",
            remedy="look at the disk; move the checkpoints folder away to begin again from the start",
            status=ExitStatus.NEEDS_PERSON,
        )
    return None


def restore_from(path: Path, tensors: Mapping[str, Piece]) -> None:
    """Fill `tensors` from this very checkpoint. Raises UserError when it is damaged."""
    try:
        _put(_read(path, tensors, lambda: None)[0], tensors)
    except DAMAGE as error:
        raise UserError(f"damaged: {error}", where=str(path), remedy="take another checkpoint (RUN@STEP)") from None


def whole_tensors(path: Path, prefix: str, *, alive: Callable[[], None] = lambda: None) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, whole tensor) one at a time, hashes checked: what an export reads. No process group.

    `alive` is called for each chunk hashed and each tensor read. Raises DAMAGE.
    """
    manifest = load_manifest(path)
    for file in manifest["files"]:
        check_hashes(path, file, manifest["files"][file], alive)
    for name, entry in manifest["tensors"].items():
        if name.startswith(prefix):
            shape = tuple(entry["shape"])
            box = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
            _fill(path, name, entry, Piece(box, (0,) * len(shape), shape))
            alive()
            yield name.removeprefix(prefix), box


def _agreed(mesh: Mesh, steps: list[int]) -> list[int]:
    """Rank 0's list on every rank: a file system may show one rank what it hides from another. Collective."""
    (count,) = mesh.sum_on_host([len(steps) if mesh.is_first else 0])
    return mesh.sum_on_host(steps if mesh.is_first else [0] * count) if count else []


def _write_rank(folder: Path, rank: int, tensors: Mapping[str, Piece], alive: Callable[[], None]) -> None:
    file = f"rank-{rank:05d}.safetensors"
    mine = {name: piece for name, piece in tensors.items() if piece.first and piece.local.numel()}
    save_file({name: piece.local.detach().cpu().contiguous() for name, piece in mine.items()}, folder / file)
    _sync(folder / file)
    pieces = {
        name: {
            "shape": piece.global_shape,
            "dtype": str(piece.local.dtype).removeprefix("torch."),
            "offset": piece.offset,
            "size": tuple(piece.local.shape),
        }
        for name, piece in mine.items()
    }
    entry = {"bytes": (folder / file).stat().st_size, "sha256": hash_chunks(folder / file, alive)}
    write_json(folder / f"rank-{rank:05d}.json", {"file": file, "entry": entry, "pieces": pieces})


def _commit(temporary: Path, final: Path, step: int, state: Mapping[str, object]) -> None:
    tensors: dict[str, Any] = {}
    files = {}
    for part in sorted(temporary.glob("rank-*.json")):
        rank = json.loads(part.read_text(encoding="utf-8"))
        files[rank["file"]] = rank["entry"]
        for name, piece in rank["pieces"].items():
            entry = tensors.setdefault(name, {"shape": piece["shape"], "dtype": piece["dtype"], "pieces": []})
            entry["pieces"].append({"file": rank["file"], "offset": piece["offset"], "size": piece["size"]})
        part.unlink()
    manifest = seal({"step": step, "state": dict(state), "files": files, "tensors": tensors})
    write_json(temporary / NAME, manifest)
    _sync(temporary)  # its names must be on the disk before its own name is
    grave = grave_of(final)
    shutil.rmtree(grave, ignore_errors=True)
    replaced = final.exists()  # the same step again, after a rewind or a restart: the newer one takes its place
    if replaced:
        final.rename(grave)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced:
            grave.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(grave, ignore_errors=True)


def _sync(path: Path) -> None:
    """A file's or a folder's content on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path, tensors: Mapping[str, Piece], alive: Callable[[], None]) -> tuple[dict[str, Tensor], Any]:
    """This rank's boxes and the state. Boxes are read beside the live tensors: those change when every rank is well."""
    manifest = load_manifest(path)
    read = {}
    checked: set[str] = set()
    for name, piece in tensors.items():
        entry = manifest["tensors"].get(name)
        if entry is None or tuple(entry["shape"]) != tuple(piece.global_shape):
            raise ValueError(f"{path}: {name} is {entry and entry['shape']} there, {list(piece.global_shape)} here")
        for part in entry["pieces"]:
            if part["file"] not in checked and _overlap(piece, part) is not None:
                check_hashes(path, part["file"], manifest["files"][part["file"]], alive)
                checked.add(part["file"])
        box = torch.empty_like(piece.local, device="cpu")
        _fill(path, name, entry, piece._replace(local=box))
        read[name] = box
    return read, manifest["state"]


def _put(read: Mapping[str, Tensor], tensors: Mapping[str, Piece]) -> None:
    with torch.no_grad():
        for name, piece in tensors.items():
            piece.local.copy_(read[name])


def _fill(path: Path, name: str, entry: Mapping[str, Any], piece: Piece) -> None:
    filled = 0
    for part in entry["pieces"]:
        overlap = _overlap(piece, part)
        if overlap is None:
            continue
        source = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, part["offset"], strict=True))
        target = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, piece.offset, strict=True))
        with safe_open(path / part["file"], framework="pt") as file:
            values = file.get_slice(name)[source] if source else file.get_tensor(name)
        piece.local[target] = values.reshape(piece.local[target].shape)
        filled += values.numel()
    if filled != piece.local.numel():
        raise ValueError(f"{path}: {name} has {filled} of {piece.local.numel()} numbers of this piece")


def _overlap(piece: Piece, part: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    ranges = []
    for mine, size, theirs, extent in zip(piece.offset, piece.local.shape, part["offset"], part["size"], strict=True):
        first, last = max(mine, theirs), min(mine + size, theirs + extent)
        if first >= last:
            return None
        ranges.append((first, last))
    return ranges


def _everywhere(mesh: Mesh, work: Callable[[], object]) -> OSError | None:
    """Do `work` on every rank and tell all of them whether any failed; the error of this rank, or a stand-in."""
    problem: OSError | None = None
    try:
        work()
    except OSError as error:
        problem = error
    except Exception as error:  # safetensors wraps the system's errors in its own
        problem = OSError(0, str(error))
    failed = mesh.sum_on_host([problem is not None])[0]
    if failed and problem is None:
        return OSError(0, f"{failed} other ranks could not write")
    return problem
