"""Law 2 with the real worker on real data: batch warm-up, accumulation, padding, and bf16."""

from pathlib import Path

import numpy as np
import pytest
import torch

from faults import divisor, document_boundaries, norm_reduction
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.plan.run_folder import RunFolder
from parity import BOUNDS, Fault, Run, check, differences, run_of_worker, units_of_one_block
from tiny import tiny

LAYOUTS = {
    "shard 2": {"shard": 2},
    "replicate 2": {"replicate": 2, "shard": 1},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
}
# Models above the demo's size are sharded in units of blocks; here one block is a unit.
UNITS: dict[str, dict[str, dict[str, object]]] = {
    "shard 2, resharded, recomputed": {"layout": {"shard": 2, "reshard": "always", "recompute": "block"}},
    "replicate 2 x shard 2, kept": {"layout": {"replicate": 2, "shard": 2, "reshard": "never"}},
    "shard 2, tied": {"layout": {"shard": 2}, "model": {"tied": True, "qk_norm": True, "qkv_bias": True}},
}
FAULTS: dict[str, Fault] = {
    "wrong divisor": divisor,
    "missing reduction": norm_reduction,
    "leaking boundary": document_boundaries,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store for all layouts."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    """The single-device run."""
    return run_of_worker(tiny(folder, run={"name": "alone"}, layout={"shard": 1}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_single_device_run(layout: str, folder: Path, alone: Run) -> None:
    config = tiny(folder, run={"name": layout.replace(" ", "-")}, layout=LAYOUTS[layout])
    check(differences(run_of_worker(config), alone), layout)


@pytest.mark.parametrize("case", [next(iter(UNITS)), *(pytest.param(c, marks=pytest.mark.slow) for c in [*UNITS][1:])])
def test_units_of_blocks_give_the_single_device_run(case: str, folder: Path) -> None:
    model, name = UNITS[case].get("model", {}), "".join(c if c.isalnum() else "-" for c in case)
    one = run_of_worker(tiny(folder, run={"name": f"{name}-1"}, model=model, layout={"shard": 1}))
    config = tiny(folder, run={"name": name}, model=model, layout=UNITS[case]["layout"])
    check(differences(run_of_worker(config, units_of_one_block), one), case)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_in_shards_give_the_single_device_run(recompute: str, folder: Path, alone: Run) -> None:
    layout = {"shard": 2, "recompute": recompute}
    config = tiny(folder, run={"name": f"compiled-{recompute}"}, layout=layout, kernels={"compile": True})
    check(differences(run_of_worker(config, units_of_one_block), alone), f"compiled, {recompute}")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bf16_compute_follows_fp32(ranks: int, folder: Path, alone: Run) -> None:
    config = tiny(folder, run={"name": f"bf16-{ranks}"}, layout={"shard": ranks, "precision": "bf16"})
    apart = np.abs(run_of_worker(config).loss / alone.loss - 1).max()
    assert 1e-6 < apart <= 2e-2  # it did compute in bf16
    saved = dict(whole_tensors(checkpoints(RunFolder.of(config).checkpoints)[-1], ""))
    dtypes = {name: tensor.dtype for name, tensor in saved.items() if name != "rng.torch"}
    assert set(dtypes.values()) == {torch.float32}  # weights and moments


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_planted_fault(fault: str, folder: Path, alone: Run) -> None:
    config = tiny(folder, run={"name": fault.replace(" ", "-")}, layout={"shard": 2})
    broken = differences(run_of_worker(config, FAULTS[fault]), alone)
    assert any(error > 10 * BOUNDS[name] for name, error in broken.items()), broken
