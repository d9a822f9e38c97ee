"""What a rank reads at a restore does not grow with the ranks that wrote: llama3-405b, by 1,024 and by 16,384 of them."""

import hashlib
import math
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from many_ranks import SHARDS, TENSOR, Weight, boxes, weights
from minka.checkpoint.filesystem import LOCAL
from minka.checkpoint.index import INDEX, StoredPiece, Table, build_index, table_name
from minka.checkpoint.manifest import CHUNK_BYTES, NAME, Sealed, read_header, seal
from minka.checkpoint.reshard import needed_shards
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.checkpoint.write import shard_name, written_shards
from minka.parallel.pieces import Piece, tensor_name

STEP = 500


class Found(NamedTuple):
    """What a reader needed: seconds and bytes of memory, the files that it opens, and the numbers that they lack."""

    seconds: float
    header_seconds: float
    memory: int
    opened: int
    missing: int


def table_of(rank: int, found: list[Weight]) -> Table:
    pieces = {
        name: StoredPiece(dtype="float32", shape=list(shape), offset=list(offset), size=list(size))
        for name, (shape, offset, size) in boxes(rank, found).items()
    }
    size = sum(4 * math.prod(piece.size) for piece in pieces.values())
    hashes = [hashlib.sha256(f"{rank} {chunk}".encode()).hexdigest() for chunk in range(-(-size // CHUNK_BYTES))]
    return Table(bytes=size, sha256=hashes, pieces=pieces)


def write_checkpoint(path: Path, stages: int) -> None:
    """All of a checkpoint, with holes for its shards: each rank's table, and what rank 0 makes of them."""
    ranks = stages * SHARDS * TENSOR
    for rank in range(ranks):
        if rank % (SHARDS * TENSOR) == 0:
            found = list(weights(rank // (SHARDS * TENSOR)))
        table = table_of(rank, found)
        (path / table_name(shard_name(rank))).write_text(table.model_dump_json())
        (path / shard_name(rank)).touch()
        os.truncate(path / shard_name(rank), table.bytes)
    began = time.perf_counter()
    index = build_index(written_shards(LOCAL, path, ranks)).model_dump_json().encode()
    print(f"index of {ranks:,} ranks: {time.perf_counter() - began:.1f} s, {len(index):,} bytes")
    (path / INDEX).write_bytes(index)
    values = {"number": 1, "time": 1.0, "step": STEP, "permanent": False, "state": {"step": STEP}}
    values |= {"chunk_bytes": CHUNK_BYTES, "index": Sealed.of(index).model_dump()}
    (path / NAME).write_bytes(seal(values))


def find_share(pipe: Connection, path: str, stage: int, shards: int, rank: int) -> None:
    """In a process of its own: find what a rank of a stage of so many shards reads."""
    pieces = {
        name: Piece(torch.empty(size, device="meta"), offset, shape)
        for name, (shape, offset, size) in boxes(rank, list(weights(stage)), shards, copies=True).items()
    }
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    header = read_header(Path(path))
    header_seconds = time.perf_counter() - began
    checkpoint = StoredCheckpoint(Path(path), header=header)
    missing = {name: piece.local.numel() for name, piece in pieces.items()}
    needed = needed_shards(checkpoint.index, pieces)
    for shard, keys in needed.items():
        for key, box in checkpoint.table(shard).pieces.items():
            if tensor_name(key) in keys:
                missing[tensor_name(key)] -= overlap(box, pieces[tensor_name(key)])
    seconds = time.perf_counter() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    pipe.send(Found(seconds, header_seconds, memory, len(needed), sum(map(abs, missing.values()))))


def overlap(box: StoredPiece, piece: Piece) -> int:
    sides = zip(box.offset, box.size, piece.offset, piece.local.shape, strict=True)
    return math.prod(max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in sides)


def reader(path: Path, stage: int, shards: int, rank: int) -> Found:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=find_share, args=(theirs, str(path), stage, shards, rank), daemon=True)
    process.start()
    theirs.close()
    try:
        return Found(*ours.recv())
    finally:
        process.join(60)


@pytest.mark.parametrize(
    "stages", [1, pytest.param(16, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["1024", "16384"]
)
def test_a_rank_finds_its_share_in_a_second_and_in_little_memory(stages: int, tmp_path: Path) -> None:
    path = tmp_path / f"step-{STEP:08d}"
    path.mkdir()
    write_checkpoint(path, stages)
    for shards, most in ((SHARDS, TENSOR), (SHARDS // 4, 4 * TENSOR), (4 * SHARDS, TENSOR)):
        found = reader(path, stages - 1, shards, rank=3 * TENSOR + 5)
        print(shards, found)
        assert found.missing == 0
        assert 1 <= found.opened <= most  # its own, and those of the copies that wrote the norms
        assert found.seconds < 1.0
        assert found.header_seconds < 0.1
        assert found.memory < 200 * 10**6
    began = time.perf_counter()
    StoredCheckpoint(path).check_files()
    print(f"all files accounted for: {time.perf_counter() - began:.1f} s")
