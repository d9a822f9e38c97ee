"""One save: all ranks write their shards into a hidden folder, the first one writes the manifest and renames it."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.commit import begin, commit, discard, step_name
from minka.checkpoint.filesystem import Disk
from minka.checkpoint.manifest import SHARD, seal
from minka.checkpoint.shard_file import Hashes
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, tensor_name
from minka.plan.retention import Kept


class Saved(NamedTuple):
    """What a save wrote."""

    path: Path
    bytes: int


class Contents(NamedTuple):
    """What goes into a checkpoint beside the tensors."""

    step: int
    state: Mapping[str, object]
    permanent: bool = False


def write(
    catalogue: Catalogue,
    contents: Contents,
    hashes: Hashes,
    pieces: Mapping[str, Piece],
    mesh: Mesh,
    *,
    alive: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a checkpoint from all ranks' images, whose hashes these are. Collective.

    Raises OSError on every rank when any could not write.

    `catalogue` is that of the run's checkpoints folder; nothing of a failed save stays. `alive` is called for each
    chunk.
    """
    folder, disk = catalogue.folder, catalogue.disk
    final, image = folder / step_name(contents.step), hashes.image
    attempt, total = mesh.sum_on_host([time.time_ns() if mesh.is_first else 0, image.buffer.numel()])
    written = folder / f".{final.name}.saving-{attempt:x}"

    def prepare() -> None:
        if mesh.is_first:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                disk.sync(folder.parent)
            begin(disk, folder, contents.step, attempt)  # first: it frees what an attempt that died has left
            _check_space(disk, folder, total)

    def write_part() -> None:
        file = f"rank-{mesh.rank:05d}.safetensors"
        disk.write(written / file, _beating(image.chunks(hashes.chunk), alive))
        entry = {"bytes": image.buffer.numel(), "sha256": hashes.result()}
        part = json.dumps({"file": file, "attempt": attempt, "entry": entry, "pieces": _table(pieces)}).encode()
        disk.write(written / f"rank-{mesh.rank:05d}.json", [memoryview(part)])

    def finish() -> None:
        if mesh.is_first:
            parts = _parts(disk, written, attempt, mesh.ranks)
            number = catalogue.next_number()
            body = {
                "number": number,
                "time": time.time(),
                "step": contents.step,
                "permanent": contents.permanent,
                "state": dict(contents.state),
                "chunk_bytes": hashes.chunk,
            }
            commit(disk, written, final, seal(body | _merged(parts)))
            catalogue.add(Kept(contents.step, number, contents.permanent))

    for work in (prepare, write_part, finish):
        problem = _everywhere(mesh, work)
        if problem:
            if mesh.is_first:
                with suppress(OSError):  # what cannot be cleared now is cleared by the next save
                    discard(disk, written)
            raise OSError(problem.errno, problem.strerror, str(final))
    return Saved(final, total)


def _beating(parts: Iterable[memoryview], alive: Callable[[], None]) -> Iterator[memoryview]:
    for part in parts:
        yield part
        alive()


def _check_space(disk: Disk, folder: Path, total: int) -> None:
    free = disk.free(folder)
    if free < total:  # found out now, not when the disk is full and the ledger cannot be written either
        raise OSError(28, f"No space left on device: {total:,} bytes to write, {free:,} free")


def _table(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    return {
        name: {
            "shape": piece.global_shape,
            "dtype": str(piece.local.dtype).removeprefix("torch."),
            "offset": piece.offset,
            "size": tuple(piece.local.shape),
        }
        for name, piece in pieces.items()
    }


def _parts(disk: Disk, written: Path, attempt: int, ranks: int) -> list[dict[str, Any]]:
    """What the ranks said they wrote, checked against what is there; then these notes are of no more use."""
    parts = []
    for rank in range(ranks):
        file = written / f"rank-{rank:05d}.json"
        part = json.loads(bytes(disk.read(file, 0, disk.size(file))))
        shard, size = written / part["file"], part["entry"]["bytes"]
        if part["attempt"] != attempt or not SHARD.fullmatch(part["file"]) or disk.size(shard) != size:
            raise OSError(0, f"{shard} is not what rank {rank} has just written")
        parts.append(part)
        disk.forget(file)
    return parts


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for part in parts:
        for key, piece in part["pieces"].items():
            name = tensor_name(key)
            entry = tensors.setdefault(name, {"shape": piece["shape"], "dtype": piece["dtype"], "pieces": []})
            named = {} if key == name else {"key": key}
            entry["pieces"].append({"file": part["file"], "offset": piece["offset"], "size": piece["size"], **named})
    return {"files": {part["file"]: part["entry"] for part in parts}, "tensors": tensors}


def _everywhere(mesh: Mesh, work: Callable[[], object]) -> OSError | None:
    """Do `work` on every rank and tell all of them whether any failed; the error of this rank, or a stand-in."""
    problem: OSError | None = None
    try:
        work()
    except OSError as error:
        problem = error if error.strerror else OSError(error.errno or 0, str(error))
    except Exception as error:  # a save that fails, for whatever reason, must not stop the training
        problem = OSError(0, f"{type(error).__name__}: {error}")
    said = mesh.first_error("" if problem is None else problem.strerror or type(problem).__name__)
    return problem or (OSError(0, said) if said else None)
