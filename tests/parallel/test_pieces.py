"""Who writes what: each box once, its copies sharing the work, without communication."""

from collections import Counter
from typing import Any

import pytest
import torch

from minka.parallel.apply import build_parts, named_parameters
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import Piece, parameter_piece, squared_norm, to_write
from minka.plan.layout import Layout
from ranks import on_ranks
from tiny import tiny

SIZES = {"embedding": 1000, **{f"block.{i}": 90 + i for i in range(12)}, "norm": 3, "scale": 1}


def pieces_of(shard: int, shards: int, copy: int, copies: int) -> dict[str, Piece]:
    """Rows of each tensor, `copies` times; one tensor too short for every shard, and one that all ranks hold."""
    made = {}
    for name, rows in SIZES.items():
        each = -(-rows // shards)
        first = min(rows, each * shard)
        made[name] = Piece(torch.zeros(min(rows, first + each) - first, 2), (first, 0), (rows, 2), copies, copy)
    made["count"] = Piece(torch.zeros(()), (), (), copies * shards, copy * shards + shard)
    return made


@pytest.mark.parametrize("copies", [1, 2])
def test_the_norm_of_a_large_tensor_is_exact(copies: int) -> None:
    """16 M numbers and 5: torch's own norm on a CPU loses 0.08 % of them."""
    large = 1e-4 * torch.randn(2**24 + 5, generator=torch.Generator().manual_seed(1))
    pieces = [Piece(tensor, (0,), tuple(tensor.shape), copies) for tensor in (large, torch.ones(7), torch.ones(0))]
    truth = float(large.double().square().sum())
    assert float(squared_norm(pieces[:1])) == pytest.approx(truth / copies, rel=1e-7)
    assert float(squared_norm(pieces)) == pytest.approx((truth + 7) / copies, rel=1e-7)
    assert float(torch._foreach_norm([large])[0]) ** 2 != pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize(("shards", "copies"), [(1, 1), (4, 1), (1, 4), (2, 2), (3, 5), (8, 16)])
def test_every_number_is_written_once_and_the_copies_share_the_work(shards: int, copies: int) -> None:
    written: Counter[tuple[str, tuple[int, ...]]] = Counter()
    numbers: dict[str, int] = Counter()
    loads = {}
    for shard in range(shards):
        for copy in range(copies):
            mine = to_write(pieces_of(shard, shards, copy, copies))
            loads[shard, copy] = sum(piece.local.numel() for piece in mine.values())
            for name, piece in mine.items():
                written[name, piece.offset] += 1
                numbers[name] += piece.local.numel()
    assert set(written.values()) == {1}
    assert numbers == {name: 2 * rows for name, rows in SIZES.items()} | {"count": 1}
    largest = 2 * max(-(-rows // shards) for rows in SIZES.values())
    for shard in range(shards):
        total = sum(loads[shard, copy] for copy in range(copies))
        assert max(loads[shard, copy] for copy in range(copies)) <= total / copies + largest


def boxes(config: Any) -> list[tuple[str, tuple[int, ...], int]]:
    """What this rank writes of a real model, and how much."""
    with start_mesh(config.layout) as mesh:
        pieces = {n: parameter_piece(p) for n, p in named_parameters(build_parts(config, mesh)).items()}
        return [(name, piece.offset, piece.local.numel()) for name, piece in to_write(pieces).items()]


@pytest.mark.parametrize(
    "layout",
    [
        {"replicate": 2, "shard": 2},
        {"replicate": 2},
        {"shard": 2},
        {"tensor": 2},
        {"shard": 2, "tensor": 2},
        {"shard": 3, "tensor": 2},
        {"shard": 2, "context": 2},
        {"pipeline": 2},
        {"pipeline": 2, "replicate": 2, "tensor": 2},
    ],
    ids=lambda layout: " x ".join(f"{axis} {ways}" for axis, ways in layout.items()),
)
def test_each_box_of_a_real_model_is_written_by_one_rank(layout: dict[str, int], tmp_path: Any) -> None:
    config = tiny(tmp_path, layout={"shard": 1, **layout, "micro_batch": 1})
    ranks = config.layout.world
    written = on_ranks(boxes, ranks, config)
    every = [(name, offset) for mine in written for name, offset, _ in mine]
    assert len(every) == len(set(every))
    whole = {name: parameter.numel() for name, parameter in build_whole(config)}
    numbers: Counter[str] = Counter()
    for mine in written:
        for name, _, size in mine:
            numbers[name] += size
    assert numbers == whole
    loads = [sum(size for _, _, size in mine) for mine in written]
    assert max(loads) < 1.7 * sum(loads) / ranks, f"one rank writes most of it: {loads}"


def build_whole(config: Any) -> list[tuple[str, torch.Tensor]]:
    alone = config.model_copy(update={"layout": Layout(shard=1)})
    with start_mesh(alone.layout) as mesh:
        return list(named_parameters(build_parts(alone, mesh)).items())
