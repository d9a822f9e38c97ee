"""What a rank reads at a restore does not grow with the ranks that wrote: llama3-405b, written by 1,024 and 16,384."""

import hashlib
import json
import math
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from many_ranks import SHARDS, TENSOR, Box, Weight, boxes, weights
from minka.checkpoint.filesystem import LOCAL
from minka.checkpoint.index import INDEX, PieceGroup, build_index, shard_name, table_name
from minka.checkpoint.manifest import CHUNK_BYTES, NAME, Sealed, read_header, seal
from minka.checkpoint.reshard import needed_ranks
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.checkpoint.write import written_tables
from minka.parallel.pieces import Piece

STEP = 500


class Found(NamedTuple):
    """What a reader needed: seconds of CPU, bytes of memory, the tables that it opens, the numbers that they lack."""

    seconds: float
    header_seconds: float
    memory: int
    opened: int
    missing: int


def table_of(rank: int, found: list[Weight]) -> tuple[str, int]:
    """As the rank would write it; made of plain values, which is faster."""
    groups: dict[Box, list[str]] = {}
    for name, box in boxes(rank, found).items():
        groups.setdefault(box, []).append(name)
    size = sum(4 * math.prod(box.size) * len(names) for box, names in groups.items())
    hashes = [hashlib.sha256(f"{rank} {chunk}".encode()).hexdigest() for chunk in range(-(-size // CHUNK_BYTES))]
    described = [{"dtype": "float32", **box._asdict(), "keys": names} for box, names in groups.items()]
    return json.dumps({"bytes": size, "sha256": hashes, "groups": described}), size


def write_checkpoint(path: Path, stages: int) -> None:
    """All of a checkpoint, with holes for its shards: each rank's table, and what rank 0 makes of them."""
    ranks = stages * SHARDS * TENSOR
    for rank in range(ranks):
        if rank % (SHARDS * TENSOR) == 0:
            found = list(weights(rank // (SHARDS * TENSOR)))
        table, size = table_of(rank, found)
        (path / table_name(rank)).write_text(table)
        (path / shard_name(rank)).touch()
        os.truncate(path / shard_name(rank), size)
    began = time.process_time()
    index = build_index(written_tables(LOCAL, path, ranks)).model_dump_json().encode()
    print(f"index of {ranks:,} ranks: {time.process_time() - began:.1f} s, {len(index):,} bytes")
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = status("VmRSS"), time.process_time()
    read_header(Path(path))
    header_seconds = time.process_time() - began
    checkpoint = StoredCheckpoint(Path(path))
    missing = {name: piece.local.numel() for name, piece in pieces.items()}
    needed = needed_ranks(checkpoint.index, pieces)
    for other, names in needed.items():
        for group in checkpoint.table(other).groups:
            for name in set(group.keys) & set(names):
                missing[name] -= overlap(group, pieces[name])
    seconds = time.process_time() - began
    memory = status("VmHWM") - before
    pipe.send(Found(seconds, header_seconds, memory, len(needed), sum(map(abs, missing.values()))))


def status(key: str) -> int:
    """Bytes of this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def overlap(box: PieceGroup, piece: Piece) -> int:
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


@pytest.mark.parametrize("stages", [1, pytest.param(16, marks=[pytest.mark.slow])], ids=["1024", "16384"])
def test_a_rank_finds_its_share_in_a_second_and_in_little_memory(stages: int, tmp_path: Path) -> None:
    path = tmp_path / f"step-{STEP:08d}"
    path.mkdir()
    write_checkpoint(path, stages)
    for shards in (SHARDS, SHARDS // 4, 4 * SHARDS):
        found = reader(path, stages - 1, shards, rank=3 * TENSOR + 5)
        print(shards, found)
        assert found.missing == 0
        assert 1 <= found.opened <= 5 * TENSOR  # its own boxes' writers, and those of the copies of norms
        assert found.seconds < 1.0
        assert found.header_seconds < 0.1
        assert found.memory < 200 * 10**6
    began = time.process_time()
    StoredCheckpoint(path).check_files()
    print(f"all files accounted for: {time.process_time() - began:.1f} s")
