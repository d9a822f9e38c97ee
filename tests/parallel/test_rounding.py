"""In bf16 no layout is further from fp32 than one process is: sums over ranks round no worse than sums on one."""

from functools import cache

import numpy as np
import pytest

from parity import Run, config_of, run_on

LAYOUTS: dict[str, tuple[dict[str, int], float]] = {
    "shard 2": ({"shard": 2}, 1.01),
    "replicate 2": ({"replicate": 2}, 1.01),
    "context 2": ({"context": 2}, 1.01),
    "pipeline 2": ({"pipeline": 2}, 1.01),
    # Here hidden states of several ranks are summed in bf16, and so are gradients of norms.
    "tensor 2": ({"tensor": 2}, 1.06),
    "tensor 4": ({"tensor": 4}, 1.1),
    "shard 2 x tensor 2": ({"shard": 2, "tensor": 2}, 1.06),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_bf16_are_as_near_to_fp32_as_those_of_one_process(layout: str) -> None:
    ways, slack = LAYOUTS[layout]
    together = run_on(config_of({**ways, "precision": "bf16"}), steps=1)
    error, usual = (distance(run, alone("fp32")) for run in (together, alone("bf16")))
    print(f"{layout}: {error:.2e} from fp32; one process {usual:.2e}")
    assert 1e-3 < usual < 7.25e-3  # it is bf16, summed in fp32
    assert error <= slack * usual


@cache
def alone(precision: str) -> Run:
    return run_on(config_of({"precision": precision}), steps=1)


def distance(run: Run, truth: Run) -> float:
    """Relative, of all gradients as one vector."""
    names = [name for name in truth.tensors if name.startswith("gradient")]
    apart = sum(float(np.square(run.tensors[name] - truth.tensors[name]).sum()) for name in names)
    return (apart / sum(float(np.square(truth.tensors[name]).sum()) for name in names)) ** 0.5
