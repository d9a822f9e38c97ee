"""Twenty steps of training with Triton's kernels and without."""

import numpy as np

from parity import Run, config_of, run_on

STEPS, ROWS = 20, 4
SHAPE = {"layers": 1, "d_model": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_ff": 24}
VARIANT = {"qk_norm": True, "tied": True}


def trained(implementation: str) -> Run:
    kernels = {"implementation": implementation, "attention": "triton" if implementation == "triton" else "sdpa"}
    layout = {"micro_batch": ROWS}
    return run_on(config_of(layout, {**SHAPE, **VARIANT}, rows=ROWS, kernels=kernels), steps=STEPS)


def test_losses_are_those_without_kernels() -> None:
    fused, plain = trained("triton"), trained("torch")
    assert np.abs(fused.loss - plain.loss).max() <= 1e-4
    assert any_differs(fused, plain)


def any_differs(one: Run, other: Run) -> bool:
    """Other sums, other rounding: a sign that the kernels ran."""
    return any(not np.array_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
