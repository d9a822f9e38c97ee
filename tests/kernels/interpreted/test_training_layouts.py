"""Twenty steps of training with Triton's kernels under layouts that cut what they work on; slow."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from parity import Run, config_of, run_on

STEPS, ROWS = 20, 4
SHAPE = {"layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_ff": 24}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"shard": 2, "tensor": 2},
    {"context": 2},
    {"pipeline": 2, "schedule": "1f1b"},
    {"recompute": "block"},
    {"recompute": "selective"},
    {"shard": 2, "engine": "deepspeed", "zero_stage": 3},
)


def trained(layout: dict[str, Any], implementation: str, **shape: Any) -> Run:
    kernels = {"implementation": implementation, "attention": "triton" if implementation == "triton" else "sdpa"}
    return run_on(config_of(layout, {**SHAPE, **shape}, rows=ROWS, kernels=kernels), steps=STEPS)


@cache
def plain(**shape: Any) -> Run:
    return trained({}, "torch", **shape)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_are_those_without_kernels(layout: dict[str, Any]) -> None:
    fused = trained(layout, "triton", qk_norm=True)
    assert np.abs(fused.loss - plain(qk_norm=True).loss).max() <= 1e-4
