"""Twenty steps of training with Triton's kernels and without."""

from typing import Any

import numpy as np
import pytest

from parity import Run, config_of, run_on

STEPS, ROWS = 20, 4
SHAPE = {"layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_ff": 24}


def trained(implementation: str, **shape: Any) -> Run:
    kernels = {"implementation": implementation, "attention": "triton" if implementation == "triton" else "sdpa"}
    return run_on(config_of({}, {**SHAPE, **shape}, rows=ROWS, kernels=kernels), steps=STEPS)


@pytest.mark.parametrize("variant", ["qk_norm", "qkv_bias"])
def test_losses_are_those_without_kernels(variant: str) -> None:
    fused, plain = (trained(implementation, **{variant: True}) for implementation in ("triton", "torch"))
    assert np.abs(fused.loss - plain.loss).max() <= 1e-4
    assert any_differs(fused, plain)


def any_differs(one: Run, other: Run) -> bool:
    """Other sums, other rounding: a sign that the kernels ran."""
    return any(not np.array_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
