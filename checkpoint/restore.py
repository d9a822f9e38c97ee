"""Checkpoints that are whole or do not exist, written and read as pieces, for any layout and any number of ranks.

    checkpoints/step-00000500/rank-00000.safetensors   the pieces that rank 0 writes (shards.py)
                              ...
                              manifest.json            where each piece lies, hashes, the run's state (manifest.py)

A save goes to a hidden folder and one rename makes it a checkpoint (commit.py). A restore checks the hash of every
chunk it reads and takes the one before when one does not hold. Which part of which file a rank needs is worked out by
torch.distributed.checkpoint's planner; its own storage is not used, because it unpickles what it finds, loads a flipped
bit without a word, and mixes two steps in a folder that is used twice. Tensors are safetensors and state is JSON.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minka.checkpoint.catalogue import checkpoints, newest_first, steps_of
from minka.checkpoint.commit import recover, set_aside, step_name
from minka.checkpoint.filesystem import LOCAL, PASSING, Disk
from minka.checkpoint.manifest import NAME, Damage, load_manifest, nbytes
from minka.checkpoint.reshard import fill
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, tensor_name
from minka.plan.errors import ExitStatus, UserError

__all__ = ["checkpoints", "load_manifest"]  # of the files beside this one, for those who train

DAMAGE = (OSError, Damage)  # what reading a damaged checkpoint raises
BATCH_BYTES = 2**30  # of tensors that an export holds at once
OPTIONAL = "rng."  # tensors that older checkpoints lack, and that nothing trained depends on


def restore(
    folder: Path,
    tensors: Mapping[str, Piece],
    mesh: Mesh,
    note: Callable[[Path, str], None],
    *,
    alive: Callable[[], None] = lambda: None,
    newest: int | None = None,
    disk: Disk = LOCAL,
) -> Any:
    """Fill `tensors` from the newest whole checkpoint and give its state, or None when there is no checkpoint.

    Collective, and for the run's one writer: what a save that died has left is mended first. `note(path, reason)` is
    told of each checkpoint passed over because it is damaged or cannot be read; once another one has been read, damaged
    ones lose their names. `alive` is called for each chunk read. Raises UserError when there are checkpoints and none
    is whole, or when the newest whole one is of another model. `newest` is the step of the newest checkpoint where rank
    0 knows it: then no other manifest is read unless that checkpoint is damaged.
    """
    if mesh.is_first:
        with suppress(OSError):  # what is there is read all the same
            recover(disk, folder)
    damaged: list[tuple[Path, _Problem]] = []
    for step in _newest_first(folder, mesh, newest, disk):
        path = folder / step_name(step)
        state, problem = _try(path, tensors, mesh, alive, disk)
        if problem is None:
            for bad, (reason, passing) in damaged:
                if mesh.is_first and not passing:
                    with suppress(OSError):  # it is passed over again the next time
                        set_aside(disk, bad)
                note(bad, reason)
            return state
        damaged.append((path, problem))
    if damaged:
        raise UserError(
            "none of the checkpoints is whole",
            where=str(folder),
            why="; ".join(problem.reason for _, problem in damaged),
            remedy="look at the disk; `minka train RUN --from-scratch` begins again at step 0",
            status=ExitStatus.NEEDS_PERSON,
        )
    return None


def restore_from(
    path: Path,
    tensors: Mapping[str, Piece],
    mesh: Mesh,
    *,
    alive: Callable[[], None] = lambda: None,
    disk: Disk = LOCAL,
) -> Any:
    """Fill `tensors`, any of those in it, from this very checkpoint and give its state. Collective.

    Raises UserError when it is damaged, or of another model.
    """
    state, problem = _try(path, tensors, mesh, alive, disk)
    if problem:
        said = "cannot be read" if problem.passing else "damaged"
        raise UserError(f"{said}: {problem.reason}", where=str(path), remedy="take another checkpoint (RUN@STEP)")
    return state


def whole_tensors(
    path: Path, prefix: str, *, alive: Callable[[], None] = lambda: None, disk: Disk = LOCAL
) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, whole tensor) one after the other, hashes checked: what an export reads. No process group.

    Read in batches of BATCH_BYTES, since each goes through all the files. `alive` is called for each chunk read. Raises
    DAMAGE.
    """
    manifest = load_manifest(path, disk)
    check_files(path, manifest, disk)
    there = sum(file["bytes"] for file in manifest["files"].values())
    batch: dict[str, Piece] = {}
    left = BATCH_BYTES
    for name, entry in manifest["tensors"].items():
        if not name.startswith(prefix):
            continue
        size, shape = nbytes(entry["shape"], entry["dtype"]), tuple(entry["shape"])
        if size > there:
            raise Damage(f"{path}: {name} is larger than all files together")
        if batch and size > left:
            yield from _filled(path, manifest, batch, prefix, alive, disk)
            batch, left = {}, BATCH_BYTES
        batch[name] = Piece(torch.empty(shape, dtype=getattr(torch, entry["dtype"])), (0,) * len(shape), shape)
        left -= size
    yield from _filled(path, manifest, batch, prefix, alive, disk)


def check_files(path: Path, manifest: Mapping[str, Any], disk: Disk = LOCAL) -> None:
    """Raises Damage (or OSError) naming a file that is missing, cut, no regular file, or does not belong here."""
    there = {name for name in disk.names(path) if not name.startswith(".")}  # .nfs0001 is the file system's own
    for name in sorted(manifest["files"].keys() - there):
        raise Damage(f"{path / name} is missing")
    for name in sorted(there - manifest["files"].keys() - {NAME}):
        raise Damage(f"{path / name} does not belong to this checkpoint")
    for name, entry in manifest["files"].items():
        size = disk.size(path / name)
        if size != entry["bytes"]:
            raise Damage(f"{path / name} has {size:,} bytes instead of {entry['bytes']:,}")


def _filled(
    path: Path,
    manifest: Mapping[str, Any],
    batch: dict[str, Piece],
    prefix: str,
    alive: Callable[[], None],
    disk: Disk,
) -> Iterator[tuple[str, Tensor]]:
    fill(path, manifest, batch, alive, disk)
    for name in list(batch):
        yield name.removeprefix(prefix), batch.pop(name).local


class _Problem(NamedTuple):
    """Why a checkpoint was not read; `passing`: by what was said, it may be whole."""

    reason: str
    passing: bool


def _try(
    path: Path, tensors: Mapping[str, Piece], mesh: Mesh, alive: Callable[[], None], disk: Disk
) -> tuple[Any, _Problem | None]:
    """The state, or why this checkpoint cannot be read, the same verdict on every rank."""
    state, problem, other, passing = None, "", "", False
    unknown: dict[str, bool] = {}
    try:
        manifest = load_manifest(path, disk)
        if mesh.is_first:  # thousands of ranks need not look at thousands of files each
            check_files(path, manifest, disk)
        other, unknown = _other_model(manifest, tensors), _unknown(manifest, tensors)
        there = manifest["tensors"]
        wanted = {key: p for key, p in tensors.items() if tensor_name(key) in there or not key.startswith(OPTIONAL)}
        if not other:
            fill(path, manifest, wanted, alive, disk)
        state = manifest["state"]
    except DAMAGE as error:
        said = str(error) or type(error).__name__
        problem = said if str(path) in said else f"{path}: {said}"
        passing = isinstance(error, OSError) and error.errno in PASSING
    problem = mesh.first_error(problem)
    if problem:
        return None, _Problem(problem, bool(mesh.sum_on_host([passing])[0]))
    held_elsewhere = mesh.sum_on_host([not absent for absent in unknown.values()])  # other stages have other tensors
    nobody = [name for name, somewhere in zip(unknown, held_elsewhere, strict=True) if not somewhere]
    other = mesh.first_error(other) or (f"it has {nobody[0]}, and this model has not" if nobody else "")
    if other:
        raise UserError(
            f"this checkpoint is of another model: {other}",
            where=str(path),
            why="its tensors do not fit this configuration's",
            remedy="give the configuration it was trained with, or another run.name",
        )
    return state, None


def _other_model(manifest: Mapping[str, Any], tensors: Mapping[str, Piece]) -> str:
    """How the tensors there differ from those wanted, by name; empty when they do not."""
    there = manifest["tensors"]
    for key, piece in tensors.items():
        name = tensor_name(key)
        dtype = str(piece.local.dtype).removeprefix("torch.")
        if name not in there:
            if not name.startswith(OPTIONAL):
                return f"it has no {name}"
        elif tuple(there[name]["shape"]) != tuple(piece.global_shape) or there[name]["dtype"] != dtype:
            found = f"{there[name]['shape']} {there[name]['dtype']}"
            return f"{name} is {found} there, {list(piece.global_shape)} {dtype} here"
    return ""


def _unknown(manifest: Mapping[str, Any], tensors: Mapping[str, Piece]) -> dict[str, bool]:
    """Of each tensor there, of a kind that is wanted, whether this rank has no part of it."""
    held = {tensor_name(key) for key in tensors}
    kinds = {name.split(".")[0] for name in held}
    return {name: name not in held for name in manifest["tensors"] if name.split(".")[0] in kinds}


def _newest_first(folder: Path, mesh: Mesh, newest: int | None, disk: Disk) -> Iterator[int]:
    """The steps to try, the same on all ranks; manifests are read for their order when `newest` has failed."""
    known = _agreed(mesh, [newest] if newest is not None and newest in steps_of(folder, disk) else [])
    yield from known
    others = newest_first(folder, disk) if mesh.is_first else []
    yield from (step for step in _agreed(mesh, others) if step not in known)


def _agreed(mesh: Mesh, steps: list[int]) -> list[int]:
    """Rank 0's list on every rank: a file system may show one rank what it hides from another. Collective."""
    (count,) = mesh.sum_on_host([len(steps) if mesh.is_first else 0])
    return mesh.sum_on_host(steps if mesh.is_first else [0] * count) if count else []
