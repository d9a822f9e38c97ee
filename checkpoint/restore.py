"""Checkpoints that are whole or do not exist, written and read as pieces, for any layout and any number of ranks.

    checkpoints/step-00000500/rank-00000.safetensors   the pieces that rank 0 writes (shard_file.py)
                              rank-00000.json          its table: the boxes and the hashes of its chunks (index.py)
                              ...
                              index.json               which file holds which boxes, and the tables' hashes (index.py)
                              manifest.json            the index's hash and the run's state (manifest.py)

A save writes to a hidden folder, and one rename makes it a checkpoint (commit.py). A restore checks the hash of
everything it reads, and takes the checkpoint before when one does not match. torch.distributed.checkpoint's storage is
not used: it unpickles what it finds, loads a flipped bit without an error, and mixes two steps in a folder that is used
twice. Tensors are safetensors and state is JSON.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minka.checkpoint.catalogue import newest_first, steps_of
from minka.checkpoint.commit import recover, set_aside, step_name
from minka.checkpoint.filesystem import LOCAL, PASSING, FileSystem, Heartbeat
from minka.checkpoint.index import Index
from minka.checkpoint.manifest import Damage
from minka.checkpoint.reshard import fill
from minka.checkpoint.shard_file import dtype_name
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, Pieces
from minka.plan.checkpoint_owner import check_own
from minka.plan.errors import ExitStatus, UserError
from minka.plan.run_folder import RunFolder
from minka.plan.tensor_name import tensor_name

DAMAGE = (OSError, Damage)  # what reading a damaged checkpoint raises
BATCH_BYTES = 2**30  # of tensors that an export holds at once
OPTIONAL = "rng."  # tensors that older checkpoints lack, and that nothing trained depends on
KINDS, CONVERTED = ("model", "moment1", "moment2"), {"float32", "bfloat16"}  # one is read as the other
Say = Callable[[str], None]


def _quiet(_: str) -> None:
    """Say nothing."""


def restore(
    folder: Path,
    tensors: Pieces,
    mesh: Mesh,
    note: Callable[[Path, str], None],
    *,
    alive: Heartbeat = lambda: None,
    say: Say = _quiet,
    newest: int | None = None,
    fs: FileSystem = LOCAL,
) -> Any:
    """Fill `tensors` from the newest whole checkpoint and return its state, or None when there is no checkpoint.

    Collective, and for the run's one writer: leftovers of a save that died are cleared first. `newest` is the step of
    the newest checkpoint where rank 0 knows it: then no other manifest is read unless that checkpoint is damaged.
    `note(path, reason)` is called for each checkpoint passed over because it is damaged or cannot be read, `say` with a
    line for each kind of tensor that is converted from fp32 to bf16 (to nearest) or from bf16 to fp32. Once a
    different one has been read, damaged ones are renamed. Raises UserError when there are checkpoints and none is
    whole, or when the newest whole one is of a different model or run.
    """
    if mesh.is_first:
        with suppress(OSError):  # what exists is read all the same
            recover(fs, folder)
    passed_over: list[tuple[Path, str, bool]] = []
    for step in _newest_first(folder, mesh, newest, fs):
        path = folder / step_name(step)
        state, problem, passing = _try(path, tensors, mesh, alive, say, fs)
        if not problem:
            for bad, reason, may_pass in passed_over:
                if mesh.is_first and not may_pass:
                    with suppress(OSError):  # it is passed over again the next time
                        set_aside(fs, bad)
                note(bad, reason)
            return state
        passed_over.append((path, problem, passing))
    if passed_over:
        raise UserError(
            "none of the checkpoints is whole",
            where=str(folder),
            why="; ".join(reason for _, reason, _ in passed_over),
            remedy="check the disk; `minka train RUN --from-scratch` starts again at step 0",
            status=ExitStatus.NEEDS_PERSON,
        )
    return None


def restore_from(
    path: Path,
    tensors: Pieces,
    mesh: Mesh,
    *,
    alive: Heartbeat = lambda: None,
    say: Say = _quiet,
    fs: FileSystem = LOCAL,
) -> Any:
    """Fill `tensors`, which may be some of those in it, from this checkpoint and return its state. Collective.

    Raises UserError when it is damaged, or of a different model or run.
    """
    state, problem, passing = _try(path, tensors, mesh, alive, say, fs)
    if problem:
        kind = "cannot be read" if passing else "damaged"
        raise UserError(f"{kind}: {problem}", where=str(path), remedy="take a different checkpoint (RUN@STEP)")
    return state


def whole_tensors(path: Path, prefix: str, *, alive: Heartbeat = lambda: None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name without prefix, whole tensor), hashes checked, for an export. Needs no process group.

    Reads in batches of BATCH_BYTES, since each batch goes through all files. Raises DAMAGE.
    """
    checkpoint = StoredCheckpoint(path, alive=alive)
    checkpoint.check_files()
    stored_bytes = sum(checkpoint.index.bytes)
    batch: dict[str, Piece] = {}
    left = BATCH_BYTES
    for name in checkpoint.index.tensors:
        if not name.startswith(prefix):
            continue
        stored = checkpoint.index[name]
        dtype, shape = getattr(torch, stored.dtype), tuple(stored.shape)
        size = math.prod(shape) * dtype.itemsize
        if size > stored_bytes:
            raise Damage(f"{path}: {name} is larger than all files together")
        if batch and size > left:
            yield from _filled(checkpoint, batch, prefix)
            left = BATCH_BYTES
        batch[name] = Piece(torch.empty(shape, dtype=dtype), (0,) * len(shape), shape)
        left -= size
    yield from _filled(checkpoint, batch, prefix)


def _filled(checkpoint: StoredCheckpoint, batch: dict[str, Piece], prefix: str) -> Iterator[tuple[str, Tensor]]:
    fill(checkpoint, batch)
    for name in list(batch):
        yield name.removeprefix(prefix), batch.pop(name).local


def _try(path: Path, tensors: Pieces, mesh: Mesh, alive: Heartbeat, say: Say, fs: FileSystem) -> tuple[Any, str, bool]:
    """The state; or why this checkpoint was not read, and whether that may pass. The same on every rank."""
    state, problem, mismatch, passing, refusal = None, "", "", False, None
    held = {tensor_name(key) for key in tensors}
    kinds = {name.split(".")[0] for name in held}
    wanted: list[str] = []  # the stored tensors of these kinds
    try:
        checkpoint = StoredCheckpoint(path, fs, alive)
        if mesh.is_first:  # thousands of ranks need not look at thousands of files each
            checkpoint.check_files()
        index, state = checkpoint.index, checkpoint.header.state
        if mesh.is_first:
            check_own(RunFolder(path.parent.parent), path, state)
        wanted = [name for name in index.tensors if name.split(".")[0] in kinds]
        mismatch = _mismatch(index, tensors)
        if not mismatch:
            fill(checkpoint, {key: piece for key, piece in tensors.items() if tensor_name(key) in index.tensors})
    except UserError as error:
        refusal = error
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        problem = reason if str(path) in reason else f"{path}: {reason}"
        passing = isinstance(error, OSError) and error.errno in PASSING
    if mesh.first_error(refusal.what if refusal else ""):
        raise refusal or SystemExit(int(ExitStatus.REFUSED))
    problem = mesh.first_error(problem)
    if problem:
        return None, problem, bool(mesh.sum_on_host([passing])[0])
    holders = mesh.sum_on_host([name in held for name in wanted])  # other stages have other tensors
    unknown = [name for name, ranks in zip(wanted, holders, strict=True) if not ranks]
    mismatch = mesh.first_error(mismatch) or (f"it has {unknown[0]}, and this model does not" if unknown else "")
    if mismatch:
        remedy = "use the configuration it was trained with, or a different run.name"
        raise UserError(f"this checkpoint is of a different model: {mismatch}", where=str(path), remedy=remedy)
    for kind, (there, here) in _conversions(index, tensors).items():
        say(f"{kind} tensors are converted: {there} in {path.name}, {here} here")
    return state, "", False


def _conversions(index: Index, tensors: Pieces) -> dict[str, tuple[str, str]]:
    """{"moment1": (dtype there, dtype here)} for the kinds of tensors that are converted."""
    names = ((tensor_name(key), dtype_name(piece.local)) for key, piece in tensors.items())
    both = ((name.split(".")[0], index[name].dtype, here) for name, here in names if name in index.tensors)
    return {kind: (there, here) for kind, there, here in both if there != here}


def _mismatch(index: Index, tensors: Pieces) -> str:
    """The first tensor that differs from its stored one in shape or type, or is not stored; empty when none does."""
    for key, piece in tensors.items():
        name = tensor_name(key)
        shape, dtype = list(piece.global_shape), dtype_name(piece.local)
        if name not in index.tensors:
            if not name.startswith(OPTIONAL):
                return f"it has no {name}"
            continue
        stored = index[name]
        same = stored.dtype == dtype or (name.split(".")[0] in KINDS and {stored.dtype, dtype} == CONVERTED)
        if list(stored.shape) != shape or not same:
            return f"{name} is {stored.shape} {stored.dtype} there, {shape} {dtype} here"
    return ""


def _newest_first(folder: Path, mesh: Mesh, newest: int | None, fs: FileSystem) -> Iterator[int]:
    """The steps to try, the same on all ranks. Manifests are read for their order only when `newest` has failed."""
    known = _from_first_rank(mesh, [newest] if newest is not None and newest in steps_of(folder, fs) else [])
    yield from known
    others = newest_first(folder, fs) if mesh.is_first else []
    yield from (step for step in _from_first_rank(mesh, others) if step not in known)


def _from_first_rank(mesh: Mesh, steps: Sequence[int]) -> list[int]:
    """Rank 0's list, on every rank: a file system may show different folders to different ranks. Collective."""
    (count,) = mesh.sum_on_host([len(steps) if mesh.is_first else 0])
    return mesh.sum_on_host(steps if mesh.is_first else [0] * count) if count else []
