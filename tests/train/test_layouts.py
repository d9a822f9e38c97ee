"""Law 2: every layout is the single-device run, from initialisation, and the comparison sees planted faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.model.transformer import Transformer
from minka.parallel import fsdp as shard
from minka.parallel.apply import build_parts, named_parameters
from minka.parallel.engine import MicroBatch, Sums, TorchEngine
from minka.parallel.fsdp_engine import ShardedEngine
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import parameter_piece
from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank

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
BOUNDS = {"loss": 2e-6, "grad_norm": 2e-5, "model": 2e-5, "moment1": 1e-4, "moment2": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store for all layouts."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The single-device run."""
    return run_of(tiny(folder, run={"name": "alone"}), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_single_device_run(layout: str, folder: Path, alone: dict[str, Any]) -> None:
    config = tiny(folder, run={"name": layout.replace(" ", "-")}, layout={"micro_batch": 2, **LAYOUTS[layout]})
    for name, error in differences(run_of(config, config.layout.world), alone).items():
        print(f"{layout}: {name} {error:.1e}")
        assert error <= BOUNDS[name], name


@pytest.mark.parametrize("case", UNITS)
def test_units_of_blocks_give_the_single_device_run(case: str, folder: Path) -> None:
    sections = UNITS[case]
    model, name = sections.get("model", {}), "".join(c if c.isalnum() else "-" for c in case)
    layout = {"micro_batch": 2, **sections["layout"]}
    one = run_of(tiny(folder, run={"name": f"{name}-1"}, model=model), 1)
    config = tiny(folder, run={"name": name}, model=model, layout=layout)
    for kind, error in differences(run_of(config, config.layout.world, "units of one block"), one).items():
        print(f"{case}: {kind} {error:.1e}")
        assert error <= BOUNDS[kind], kind


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_in_shards_give_the_single_device_run(
    recompute: str, folder: Path, alone: dict[str, Any]
) -> None:
    layout = {"micro_batch": 2, "shard": 2, "recompute": recompute}
    config = tiny(folder, run={"name": f"compiled-{recompute}"}, layout=layout, kernels={"compile": True})
    for kind, error in differences(run_of(config, 2, "units of one block", seconds=240), alone).items():
        print(f"compiled, recompute {recompute}: {kind} {error:.1e}")
        assert error <= BOUNDS[kind], kind


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_compute_follows_fp32(ranks: int, folder: Path, alone: dict[str, Any]) -> None:
    layout = {"micro_batch": 2, "precision": "bf16"}
    config = tiny(folder, run={"name": f"bf16-{ranks}"}, layout=layout)
    low = run_of(config, ranks)
    assert np.abs(low["loss"] / alone["loss"] - 1).max() <= 2e-2
    assert np.abs(low["loss"] / alone["loss"] - 1).max() > 1e-6  # it did compute in bf16
    saved = dict(whole_tensors(checkpoints(RunFolder.of(config).checkpoints)[-1], ""))
    dtypes = {name: tensor.dtype for name, tensor in saved.items() if name != "rng.torch"}
    assert set(dtypes.values()) == {torch.float32}  # weights and moments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_bitwise_equal_under_every_layout(layout: str, folder: Path) -> None:
    alone = whole_initial(tiny(folder), 1)
    together = whole_initial(tiny(folder, layout=LAYOUTS[layout]), tiny(folder, layout=LAYOUTS[layout]).layout.world)
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        assert np.array_equal(weight, together[name]), name


@pytest.mark.parametrize("fault", ["wrong divisor", "missing reduction", "leaking boundary"])
def test_the_comparison_sees_a_planted_fault(fault: str, folder: Path, alone: dict[str, Any]) -> None:
    config = tiny(folder, run={"name": fault.replace(" ", "-")}, layout={"micro_batch": 2, "shard": 2})
    broken = differences(run_of(config, 2, fault), alone)
    assert any(error > 10 * BOUNDS[name] for name, error in broken.items()), broken


def run_of(config: RunConfig, ranks: int, fault: str = "", seconds: float = 120) -> dict[str, Any]:
    """Losses, norms and all final tensors of a whole run by the real worker."""
    on_ranks(train_with, ranks, config, fault, seconds=seconds)
    folder = RunFolder.of(config)
    steps = [line for line in read_ledger(folder.ledger_file) if line["event"] == "step"]
    assert len(steps) == config.total_steps
    tensors = {name: tensor.double().numpy() for name, tensor in whole_tensors(checkpoints(folder.checkpoints)[-1], "")}
    return {
        "loss": np.array([s["loss"] for s in steps]),
        "grad_norm": np.array([s["grad_norm"] for s in steps]),
        "tensors": tensors,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Worst relative difference of losses and norms; of tensors, by kind, in relative Frobenius norm."""
    worst = {key: float(np.abs((one[key] - other[key]) / other[key]).max()) for key in ("loss", "grad_norm")}
    for name, tensor in one["tensors"].items():
        kind = name.split(".")[0]
        if kind in BOUNDS:
            reference = other["tensors"][name]
            error = float(np.linalg.norm(tensor - reference)) / max(float(np.linalg.norm(reference)), 1e-30)
            worst[kind] = float(np.maximum(worst.get(kind, 0.0), error))  # NaN stays
    return worst


def train_with(config: RunConfig, fault: str) -> int:
    """One rank of a run, with a fault planted first."""
    if fault:
        FAULTS[fault]()
    return train_rank(config)


def whole_initial(config: RunConfig, ranks: int) -> dict[str, NDArray[np.float32]]:
    """Initial weights put together from the ranks' pieces."""
    whole: dict[str, NDArray[np.float32]] = {}
    for pieces in on_ranks(initial_pieces, ranks, config):
        for name, (local, offset, shape) in pieces.items():
            into = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            into[tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))] = local
    return whole


def initial_pieces(config: RunConfig) -> dict[str, tuple[NDArray[np.float32], tuple[int, ...], tuple[int, ...]]]:
    """This rank's pieces of the initial weights."""
    with start_mesh(config.layout) as mesh:
        pieces = {n: parameter_piece(p) for n, p in named_parameters(build_parts(config, mesh)).items()}
        return {name: (p.local.numpy().copy(), p.offset, p.global_shape) for name, p in pieces.items()}


def plant_wrong_divisor() -> None:
    """Divide by this rank's targets times the ranks: right only where every rank has equally many."""
    right = ShardedEngine.forward_backward

    def wrong(self: ShardedEngine, micro_batches: list[MicroBatch], target_count: int) -> Sums:
        mine = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        return right(self, micro_batches, mine * self.mesh.ranks)

    ShardedEngine.forward_backward = wrong  # type: ignore[assignment,method-assign]


def plant_missing_reduction() -> None:
    """The gradient norm of each rank's own piece."""
    right = TorchEngine.grad_norm

    def wrong(self: TorchEngine) -> torch.Tensor:
        summed = Mesh.sum_
        Mesh.sum_ = lambda mesh, tensor: tensor  # type: ignore[method-assign,assignment]
        try:
            return right(self)
        finally:
            Mesh.sum_ = summed  # type: ignore[method-assign]

    TorchEngine.grad_norm = wrong  # type: ignore[method-assign]


def plant_leaking_boundary() -> None:
    """Attention that takes a row for one document."""
    right = Transformer.forward

    def wrong(self: Transformer, tokens: torch.Tensor, documents: object, *rest: Any, **more: Any) -> object:
        return right(self, tokens, None, *rest, **more)

    Transformer.forward = wrong  # type: ignore[assignment,method-assign]


def make_units() -> None:
    """No fault: every block becomes a unit of its own."""
    shard.UNIT_BYTES = 1


FAULTS: dict[str, Callable[[], None]] = {
    "wrong divisor": plant_wrong_divisor,
    "missing reduction": plant_missing_reduction,
    "leaking boundary": plant_leaking_boundary,
    "units of one block": make_units,
}
