"""One save: all ranks write their shards into a hidden folder; rank 0 writes index and manifest and renames it."""

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.commit import commit, recover, step_name
from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.index import INDEX, PieceGroup, Table, build_index, shard_name, table_name
from minka.checkpoint.manifest import Sealed, parse_model, seal
from minka.checkpoint.shard_file import ChunkHasher, dtype_name
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Pieces
from minka.plan.retention import Kept


class SaveRequest(NamedTuple):
    """What goes into a checkpoint in addition to the tensors."""

    step: int
    state: Mapping[str, object]
    permanent: bool = False


def write(
    catalogue: Catalogue, request: SaveRequest, hasher: ChunkHasher, pieces: Pieces, mesh: Mesh
) -> tuple[Path, int]:
    """Write a checkpoint from the staging buffers of all ranks; its path, and the bytes of all shards. Collective.

    `hasher` is that of this rank's buffer, `catalogue` that of the run's checkpoints folder. Raises OSError on every
    rank when any of them could not write; nothing of a failed save stays.
    """
    folder, fs = catalogue.folder, catalogue.fs
    final, size = folder / step_name(request.step), hasher.staged.buffer.numel()
    attempt, total = mesh.sum_on_host([time.time_ns() if mesh.is_first else 0, size])
    written = folder / f".{final.name}.saving-{attempt:x}"  # no other attempt ever has this name

    def prepare() -> None:
        if mesh.is_first:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                fs.sync(folder.parent)
            recover(fs, folder)  # first: it deletes what a killed attempt left
            fs.mkdir(written)
            free = fs.free_bytes(folder)
            if free < total:  # said now, not when the disk is full and the ledger cannot be written either
                raise OSError(errno.ENOSPC, f"No space left on device: {total:,} bytes to write, {free:,} free")

    def write_shard() -> None:
        fs.write(written / shard_name(mesh.rank), hasher.chunks())
        table = Table(bytes=size, sha256=hasher.result(), groups=_groups(pieces))
        fs.write(written / table_name(mesh.rank), [memoryview(table.model_dump_json().encode())])

    def finish() -> None:
        if mesh.is_first:
            index = build_index(written_tables(fs, written, mesh.ranks)).model_dump_json().encode()
            fs.write(written / INDEX, [memoryview(index)])
            number = catalogue.next_number()
            header = {"number": number, "time": time.time(), **request._asdict()}
            header |= {"chunk_bytes": hasher.chunk_bytes, "index": Sealed.of(index).model_dump()}
            commit(fs, written, final, seal(header))
            catalogue.add(Kept(request.step, number, request.permanent))

    for work in (prepare, write_shard, finish):
        problem = _on_all_ranks(mesh, work)
        if problem:
            if mesh.is_first:
                with suppress(OSError):  # what cannot be deleted now is deleted by the next save
                    fs.rmtree(written)
            raise OSError(f"{problem}: {final}")
    return final, total


def _groups(pieces: Pieces) -> list[PieceGroup]:
    groups: dict[str, PieceGroup] = {}
    for key, (local, offset, shape, *_) in pieces.items():
        box = {"shape": list(shape), "offset": list(offset), "size": list(local.shape)}
        group = PieceGroup(dtype=dtype_name(local), keys=[], **box)
        groups.setdefault(group.model_dump_json(), group).keys.append(key)
    return list(groups.values())


def written_tables(fs: FileSystem, written: Path, ranks: int) -> Iterator[tuple[Table, Sealed]]:
    """The tables of all ranks. Raises OSError where a shard is not in the folder as its table says."""
    for rank in range(ranks):
        file = written / table_name(rank)
        raw = fs.read(file, 0, fs.size(file))
        table = parse_model(Table, raw, file)
        if fs.size(written / shard_name(rank)) != table.bytes:
            raise OSError(f"{written / shard_name(rank)} is not what rank {rank} has just written")
        yield table, Sealed.of(raw)


def _on_all_ranks(mesh: Mesh, work: Callable[[], object]) -> str:
    """Do `work` on every rank. Returns the error of this rank, or of the first that failed, or "". Collective."""
    problem = ""
    try:
        work()
    except Exception as error:  # a save that fails, for whatever reason, must not stop the training
        problem = describe_error(error)
    return mesh.first_error(problem)


def describe_error(error: Exception) -> str:
    """An error for the ledger."""
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
