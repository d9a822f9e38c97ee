"""One save: all ranks write their shards into a hidden folder; rank 0 writes index and manifest and renames it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.commit import commit, start_writing, step_name
from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.index import INDEX, PieceGroup, Table, build_index, shard_name, table_name
from minka.checkpoint.manifest import Sealed, parse, seal
from minka.checkpoint.shard_file import ChunkHasher, dtype_name
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.plan.retention import Kept


class Saved(NamedTuple):
    """What a save wrote."""

    path: Path
    bytes: int


class SaveRequest(NamedTuple):
    """What goes into a checkpoint in addition to the tensors."""

    step: int
    state: Mapping[str, object]
    permanent: bool = False


def write(
    catalogue: Catalogue,
    request: SaveRequest,
    hasher: ChunkHasher,
    pieces: Mapping[str, Piece],
    mesh: Mesh,
    *,
    alive: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a checkpoint from the staging buffers of all ranks. Collective.

    `hasher` is that of this rank's buffer, `catalogue` that of the run's checkpoints folder. `alive` is called for each
    chunk. Raises OSError on every rank when any of them could not write; nothing of a failed save stays.
    """
    folder, fs = catalogue.folder, catalogue.fs
    final, staged = folder / step_name(request.step), hasher.staged
    attempt, total = mesh.sum_on_host([time.time_ns() if mesh.is_first else 0, staged.buffer.numel()])
    written = folder / f".{final.name}.saving-{attempt:x}"  # no other attempt ever has this name

    def prepare() -> None:
        if mesh.is_first:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                fs.sync(folder.parent)
            start_writing(fs, written)  # first: it deletes what a killed attempt left
            _check_space(fs, folder, total)

    def write_shard() -> None:
        fs.write(written / shard_name(mesh.rank), _with_heartbeat(staged.chunks(hasher.chunk_bytes), alive))
        table = Table(bytes=staged.buffer.numel(), sha256=hasher.result(), groups=_groups(pieces))
        fs.write(written / table_name(mesh.rank), [memoryview(table.model_dump_json().encode())])

    def finish() -> None:
        if mesh.is_first:
            index = build_index(written_tables(fs, written, mesh.ranks)).model_dump_json().encode()
            fs.write(written / INDEX, [memoryview(index)])
            number = catalogue.next_number()
            header = {
                "number": number,
                "time": time.time(),
                "step": request.step,
                "permanent": request.permanent,
                "state": dict(request.state),
                "chunk_bytes": hasher.chunk_bytes,
                "index": Sealed.of(index).model_dump(),
            }
            commit(fs, written, final, seal(header))
            catalogue.add(Kept(request.step, number, request.permanent))

    for work in (prepare, write_shard, finish):
        problem = _on_all_ranks(mesh, work)
        if problem:
            if mesh.is_first:
                with suppress(OSError):  # what cannot be deleted now is deleted by the next save
                    fs.rmtree(written)
            raise OSError(problem.errno, problem.strerror, str(final))
    return Saved(final, total)


def _with_heartbeat(parts: Iterable[memoryview], alive: Callable[[], None]) -> Iterator[memoryview]:
    for part in parts:
        yield part
        alive()


def _check_space(fs: FileSystem, folder: Path, total: int) -> None:
    free = fs.free_bytes(folder)
    if free < total:  # said now, not when the disk is full and the ledger cannot be written either
        raise OSError(28, f"No space left on device: {total:,} bytes to write, {free:,} free")


def _groups(pieces: Mapping[str, Piece]) -> list[PieceGroup]:
    groups: dict[str, PieceGroup] = {}
    for key, (local, offset, shape, *_) in pieces.items():
        group = PieceGroup(
            dtype=dtype_name(local), shape=list(shape), offset=list(offset), size=list(local.shape), keys=[]
        )
        groups.setdefault(group.model_dump_json(), group).keys.append(key)
    return list(groups.values())


def written_tables(fs: FileSystem, written: Path, ranks: int) -> Iterator[tuple[Table, Sealed]]:
    """The tables of all ranks. Raises OSError where a shard is not in the folder as its table says."""
    for rank in range(ranks):
        file = written / table_name(rank)
        raw = fs.read(file, 0, fs.size(file))
        table = parse(Table, raw, file)
        if fs.size(written / shard_name(rank)) != table.bytes:
            raise OSError(0, f"{written / shard_name(rank)} is not what rank {rank} has just written")
        yield table, Sealed.of(raw)


def _on_all_ranks(mesh: Mesh, work: Callable[[], object]) -> OSError | None:
    """Do `work` on every rank. Returns the error of this rank, or one that names a rank that failed. Collective."""
    problem: OSError | None = None
    try:
        work()
    except OSError as error:
        problem = error if error.strerror else OSError(error.errno or 0, str(error))
    except Exception as error:  # a save that fails, for whatever reason, must not stop the training
        problem = OSError(0, f"{type(error).__name__}: {error}")
    reason = mesh.first_error("" if problem is None else problem.strerror or type(problem).__name__)
    return problem or (OSError(0, reason) if reason else None)
