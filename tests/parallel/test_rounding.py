"""In bf16 no layout is further from fp32 than one process is: sums over ranks round no worse than sums on one."""

from functools import cache

import numpy as np
import pytest

from parity import Run, config_of, run_on

LAYOUTS = {
    "shard 2": {"shard": 2},
    "tensor 2": {"tensor": 2},
    "tensor 4": {"tensor": 4},
    "context 2": {"context": 2},
    "pipeline 2": {"pipeline": 2},
}
SLACK = 1.15  # tensor 4: 1.08


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_bf16_are_as_near_to_fp32_as_those_of_one_process(layout: str) -> None:
    together = run_on(config_of({**LAYOUTS[layout], "precision": "bf16"}), steps=1)
    error, usual = (distance(run, alone("fp32")) for run in (together, alone("bf16")))
    print(f"{layout}: {error:.2e} from fp32; one process {usual:.2e}")
    assert 1e-3 < usual < 2e-2  # it is bf16
    assert error <= SLACK * usual


@cache
def alone(precision: str) -> Run:
    return run_on(config_of({"precision": precision}), steps=1)


def distance(run: Run, truth: Run) -> float:
    """Relative, of all gradients as one vector."""
    names = [name for name in truth.tensors if name.startswith("gradient")]
    apart = sum(float(np.square(run.tensors[name] - truth.tensors[name]).sum()) for name in names)
    return (apart / sum(float(np.square(truth.tensors[name]).sum()) for name in names)) ** 0.5
