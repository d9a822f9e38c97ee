"""Training with Triton's kernels under layouts that cut what they work on; slow."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from parity import Run, config_of, run_on

ROWS = 4
SHAPE = {"layers": 2, "d_model": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "qk_norm": True}
LAYOUTS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"shard": 2, "tensor": 2, "micro_batch": 2}, 20),
    ({"context": 2, "micro_batch": 4}, 20),
    ({"pipeline": 2, "schedule": "1f1b", "micro_batch": 2}, 20),
    ({"recompute": "block", "micro_batch": 4}, 4),
    ({"recompute": "selective", "micro_batch": 4}, 4),
    ({"shard": 2, "engine": "deepspeed", "zero_stage": 3, "micro_batch": 2}, 4),
)


def trained(layout: dict[str, Any], implementation: str, steps: int) -> Run:
    kernels = {"implementation": implementation, "attention": "triton" if implementation == "triton" else "sdpa"}
    return run_on(config_of(layout, SHAPE, rows=ROWS, kernels=kernels), steps=steps)


@cache
def plain(steps: int) -> Run:
    return trained({}, "torch", steps)


@pytest.mark.parametrize(("layout", "steps"), LAYOUTS, ids=str)
def test_losses_are_those_without_kernels(layout: dict[str, Any], steps: int) -> None:
    fused = trained(layout, "triton", steps)
    assert len(fused.loss) == steps
    assert np.abs(fused.loss - plain(steps).loss).max() <= 1e-4
