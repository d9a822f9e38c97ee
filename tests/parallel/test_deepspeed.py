"""ZeRO is the single-device run, refuses without a trace, and its checkpoints are everybody's."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import restore_from, whole_tensors
from minka.parallel import deepspeed_engine as zero
from minka.parallel.mesh import Mesh, start_mesh
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.train.build_engine import build_engine
from parity import STEPS, Run, batch_of, check, config_of, differences, inputs_of, run_on, update
from ranks import on_ranks
from saved import save

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the deepspeed extra")
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 1": (2, {"zero_stage": 1}),
    "stage 2": (2, {"zero_stage": 2}),
    "stage 3": (2, {"zero_stage": 3}),
    "stage 3, one rank": (1, {"zero_stage": 3}),
    "stage 2, three ranks": (3, {"zero_stage": 2}),
    "stage 3, three ranks": (3, {"zero_stage": 3}),
    "stage 1, moments offloaded": (2, {"zero_stage": 1, "offload": "optimizer"}),
    "stage 2, moments offloaded": (2, {"zero_stage": 2, "offload": "optimizer"}),
    "stage 3, moments offloaded": (2, {"zero_stage": 3, "offload": "optimizer"}),
    "stage 3, all offloaded": (2, {"zero_stage": 3, "offload": "all"}),
}
STAGES = [1, 2, 3]
# Odd sizes: a cut of the flattened weights falls within a row.
ODD = {"layers": 2, "d_model": 30, "head_dim": 6, "heads": 5, "kv_heads": 1, "d_ff": 71}
Tensors = dict[str, NDArray[Any]]


def configured(model: dict[str, Any] | None = None, **layout: Any) -> RunConfig:
    """The odd model under a layout of 1, 2 or 3 ranks; every gradient is clipped."""
    optimizer = {"learning_rate": 3e-3, "max_norm": 0.05}
    values = {"micro_batch": 2, **layout}
    quiet = {"export": False}  # no Hugging Face model has biases and norms of queries
    return config_of(values, {**ODD, **(model or {})}, rows=12, optimizer=optimizer, checkpoint=quiet)


def few(case: Any, *core: Any) -> Any:
    """A case that is slow, unless it is one of `core`."""
    return pytest.param(case, marks=[] if case in core else pytest.mark.slow)


@pytest.fixture(scope="module")
def alone() -> Run:
    """The run of one process without DeepSpeed."""
    return run_on(configured())


@needs_deepspeed
@pytest.mark.parametrize("variant", [few(variant, "stage 2", "stage 3") for variant in VARIANTS])
def test_zero_gives_the_single_device_run(variant: str, alone: Run) -> None:
    ranks, layout = VARIANTS[variant]
    found = run_on(configured(engine="deepspeed", shard=ranks, **layout), keep_nothing_whole)
    check(differences(found, alone), variant)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_tied_recomputed_models_with_biases_do_too(stage: int) -> None:
    model = {"tied": True, "qk_norm": True, "qkv_bias": True}
    config = configured(model, engine="deepspeed", shard=2, zero_stage=stage, recompute="block")
    check(differences(run_on(config), run_on(configured(model))), f"stage {stage}")


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_bf16_compute_follows_fp32(stage: int, alone: Run) -> None:
    config = configured(engine="deepspeed", shard=2, zero_stage=stage, precision="bf16")
    errors = differences(run_on(config), alone)  # initial weights are never rounded
    print(f"stage {stage}: {errors}")
    assert 1e-6 < errors["loss"] < 2e-2
    assert errors["grad_norm"] < 2e-2
    assert errors["gradient"] < 0.1


@needs_deepspeed
@pytest.mark.parametrize("offload", [few(where, "none") for where in ("none", "optimizer")])
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_a_refused_step_changes_no_bit(stage: int, offload: str) -> None:
    config = configured(engine="deepspeed", shard=2, zero_stage=stage, offload=offload)
    for before, finite, poisoned, straight, after in on_ranks(refusing, 2, config):
        assert same(before, finite)
        assert same(before, poisoned)
        assert same(straight, after)
        assert not same(before, after)


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [few(v, "stage 3") for v in ("stage 1", "stage 2", "stage 3", "stage 3, three ranks", "stage 3, all offloaded")],
)
def test_checkpoints_go_to_fsdp_and_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    ranks, layout = VARIANTS[variant]
    fsdp, deepspeed = configured(shard=2), configured(engine="deepspeed", shard=ranks, **layout)
    losses = on_ranks(save_trained, 2, fsdp, tmp_path / "fsdp")
    assert on_ranks(copy, ranks, deepspeed, tmp_path / "fsdp", tmp_path / "zero")[0] == losses[0]
    assert on_ranks(copy, 1, configured(), tmp_path / "zero", tmp_path / "alone")[0] == losses[0]
    first, *others = [read(tmp_path / name) for name in ("fsdp", "zero", "alone")]
    assert all(same(first, other) for other in others)
    assert any(tensor.any() for name, tensor in first.items() if name.startswith("moment2"))


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_asking_the_model_between_the_halves_of_a_step_changes_nothing(stage: int) -> None:
    expected = on_ranks(asked, 1, configured())[0]
    for found in on_ranks(asked, 2, configured(engine="deepspeed", shard=2, zero_stage=stage)):
        for key in ("losses", "logits", "attention", "weights", "updates"):
            error = np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key])
            print(f"stage {stage}: {key} {error:.1e}")
            assert error <= 5e-6, key
        assert same(found["asked"], found["not asked"])


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_nothing_is_written_or_compiled(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(engine="deepspeed", shard=2, zero_stage=stage)
    monkeypatch.chdir(tmp_path)
    for seen in on_ranks(with_empty_home, 2, config, str(tmp_path)):
        assert seen == []


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(engine="deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    mesh = Mesh(config.layout, torch.device("cpu"), 0, None)
    with pytest.raises(UserError, match=r"minka\[deepspeed\]"):
        zero.build_deepspeed_engine(config, mesh, lambda name, dims: 0.0)


@pytest.mark.parametrize(
    "layout",
    [
        {"engine": "deepspeed", "replicate": 2},
        {"offload": "optimizer"},
        {"engine": "deepspeed", "zero_stage": 2, "offload": "all"},
    ],
)
def test_what_zero_cannot_run_is_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"set layout"):
        configured(**layout)


def keep_nothing_whole() -> None:
    """Without the exception for small parameters, which here would be all of them."""
    zero.PERSISTENT = 0


def step_of(config: RunConfig, step: int, engine: Any, mesh: Mesh, accept: bool = True) -> None:
    """A whole training step, which may be refused."""
    engine.forward_backward(*inputs_of(config, step, engine, mesh))
    update(config, min(step, STEPS - 1), engine, accept)


def refusing(config: RunConfig) -> list[Tensors]:
    """All state of a rank before a refused step, after two of them, and after another step without and with them."""
    seen: list[Tensors] = []
    with start_mesh(config.layout) as mesh:  # one for both: DeepSpeed keeps the first process group for good
        for refuse in (False, True):
            engine: Any = build_engine(config, mesh)[0]
            for step in range(2):
                step_of(config, step, engine, mesh)
                if step == 0 and refuse:
                    seen.insert(0, state_of(config, engine, mesh))
                    step_of(config, 7, engine, mesh, accept=False)
                    seen.insert(1, state_of(config, engine, mesh))
                    engine.forward_backward(inputs_of(config, 8, engine, mesh)[0], math.nan)
                    update(config, 4, engine, torch.isfinite(engine.grad_norm()))
                    seen.insert(2, state_of(config, engine, mesh))
            seen.append(state_of(config, engine, mesh))
    return seen


def state_of(config: RunConfig, engine: Any, mesh: Mesh) -> Tensors:
    """Masters and moments of a rank, and what the model computes with its own copy of the weights."""
    state = {key: piece.local.numpy().copy() for key, piece in engine.tensors().items()}
    return state | {"losses": engine.token_losses(inputs_of(config, 9, engine, mesh)[0][0]).numpy()}


def save_trained(config: RunConfig, folder: Path) -> list[float]:
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        for step in range(2):
            step_of(config, step, engine, mesh)
        save(folder, 2, engine.tensors(), {}, mesh)
        return losses_of(config, engine)


def copy(config: RunConfig, source: Path, target: Path) -> list[float]:
    """Restore a checkpoint and save it again; the losses by its weights."""
    keep_nothing_whole()
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        restore_from(checkpoints(source)[-1], engine.tensors(), mesh)
        engine.after_restore()
        save(target, 2, engine.tensors(), {}, mesh)
        return losses_of(config, engine)


def losses_of(config: RunConfig, engine: Any) -> list[float]:
    """Of the same rows on every rank."""
    rows = engine.prepare(batch_of(config, 9).take(slice(0, 2)))
    return [float(loss) for loss in engine.token_losses(rows).flatten()[:8]]


def asked(config: RunConfig) -> dict[str, Any]:
    """Losses, logits and norms of a model that is asked before, between and after the halves of a step."""
    keep_nothing_whole()
    found: dict[str, Any] = {}
    with start_mesh(config.layout) as mesh:
        for asks in (True, False):
            engine, optimizer = build_engine(config, mesh)
            row = batch_of(config, 9).take(slice(0, 1))
            inputs = engine.prepare(row)
            for step in range(2):
                engine.forward_backward(*inputs_of(config, step, engine, mesh))
                if asks:
                    found["attention"] = torch.stack(list(engine.attention_logits(inputs).values())).numpy()
                update(config, step, engine)
                if asks:
                    found["losses"] = engine.token_losses(inputs).numpy()
                    found["logits"] = engine.next_logits(row.tokens, 7).numpy()
            found["asked" if asks else "not asked"] = state_of(config, engine, mesh)
            squares = {n: p.local.double().square().sum() for n, p in engine.weight_pieces().items()}
            found["weights"] = mesh.sum_(torch.stack(list(squares.values()))).numpy()
            found["updates"] = mesh.sum_(torch.stack(list(optimizer.update_squares(1e-3).values()))).numpy()
    return found


def with_empty_home(config: RunConfig, home: str) -> list[str]:
    """Files that have appeared under `home`, where everything that has a place by default has it."""
    import os

    for name in ("HOME", "TMPDIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        os.environ[name] = home
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        for step in range(2):
            step_of(config, step, engine, mesh)
    return [str(path) for path in Path(home).rglob("*")]


def read(folder: Path) -> Tensors:
    """All tensors of the newest checkpoint."""
    return {name: tensor.numpy() for name, tensor in whole_tensors(checkpoints(folder)[-1], "")}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(tensor, other[name]) for name, tensor in one.items())
