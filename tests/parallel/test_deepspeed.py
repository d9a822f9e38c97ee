"""ZeRO is the single-device run, refuses without a trace, and its checkpoints are everybody's."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minka.checkpoint.restore import checkpoints, restore_from
from minka.parallel import deepspeed_engine as zero
from minka.parallel import deepspeed_slices as zero_slices
from minka.parallel.mesh import Mesh, start_mesh
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.train.build_engine import build_engine
from ranks import on_ranks
from saved import save
from short_runs import BOUNDS, configured, differences, micro_batches, read, same, take, together, trained
from tiny import tiny, train_rank

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


def few(case: Any, *core: Any) -> Any:
    """A case that is slow, unless it is one of `core`."""
    return pytest.param(case, marks=[] if case in core else pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus for all."""
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """The run of one process without DeepSpeed."""
    return on_ranks(trained, 1, configured(folder))


@needs_deepspeed
@pytest.mark.parametrize("variant", [few(variant, "stage 2", "stage 3") for variant in VARIANTS])
def test_zero_gives_the_single_device_run(variant: str, folder: Path, alone: list[dict[str, Any]]) -> None:
    ranks, layout = VARIANTS[variant]
    config = configured(folder, engine="deepspeed", **layout)
    found = on_ranks(with_nothing_kept, ranks, trained, config)
    for kind, error in differences(found, alone).items():
        print(f"{variant}: {kind} {error:.1e}")
        assert error <= BOUNDS[kind], kind
    initial, expected = together([f["initial"] for f in found]), together([f["initial"] for f in alone])
    assert all(np.array_equal(initial[name], tensor) for name, tensor in expected.items())


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_tied_recomputed_models_with_biases_do_too(stage: int, folder: Path) -> None:
    model = {"tied": True, "qk_norm": True, "qkv_bias": True}
    one = on_ranks(trained, 1, configured(folder, model))
    config = configured(folder, model, engine="deepspeed", zero_stage=stage, recompute="block")
    for kind, error in differences(on_ranks(trained, 2, config), one).items():
        print(f"stage {stage}: {kind} {error:.1e}")
        assert error <= BOUNDS[kind], kind


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_bf16_compute_follows_fp32(stage: int, folder: Path, alone: list[dict[str, Any]]) -> None:
    config = configured(folder, engine="deepspeed", zero_stage=stage, precision="bf16")
    found = on_ranks(trained, 2, config)
    errors = differences(found, alone)
    print(f"stage {stage}: {errors}")
    assert 1e-6 < errors["loss"] < 2e-2
    assert errors["norm"] < 2e-2
    assert errors["gradient"] < 0.1
    initial, expected = together([f["initial"] for f in found]), together([f["initial"] for f in alone])
    assert all(np.array_equal(initial[name], tensor) for name, tensor in expected.items())  # never rounded


@needs_deepspeed
@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_a_refused_step_changes_no_bit(stage: int, offload: str, folder: Path) -> None:
    config = configured(folder, engine="deepspeed", zero_stage=stage, offload=offload)
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
    fsdp, deepspeed = configured(tmp_path), configured(tmp_path, engine="deepspeed", **layout)
    losses = on_ranks(save_trained, 2, fsdp, tmp_path / "fsdp")
    assert on_ranks(with_nothing_kept, ranks, copy, deepspeed, tmp_path / "fsdp", tmp_path / "zero")[0] == losses[0]
    assert on_ranks(copy, 1, fsdp, tmp_path / "zero", tmp_path / "alone")[0] == losses[0]
    first, *others = [read(tmp_path / name) for name in ("fsdp", "zero", "alone")]
    assert all(same(first, other) for other in others)
    assert any(tensor.any() for name, tensor in first.items() if name.startswith("moment2"))


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_asking_the_model_between_the_halves_of_a_step_changes_nothing(stage: int, folder: Path) -> None:
    expected = on_ranks(asked, 1, configured(folder))[0]
    for found in on_ranks(with_nothing_kept, 2, asked, configured(folder, engine="deepspeed", zero_stage=stage)):
        for key in ("losses", "logits", "attention", "weights", "updates"):
            error = np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key])
            print(f"stage {stage}: {key} {error:.1e}")
            assert error <= 5e-6, key
        assert same(found["asked"], found["not asked"])


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage) for stage in (2, 3)])
def test_a_run_of_the_real_worker_goes_on_where_it_stopped(stage: int, tmp_path: Path) -> None:
    tracking = {"log_every": 5, "detail_every": 5}
    layout = {"micro_batch": 2, "shard": 2, "engine": "deepspeed", "zero_stage": stage}
    assert on_ranks(train_rank, 2, tiny(tmp_path, run={"name": "a"}, layout=layout, tracking=tracking)) == [0, 0]
    half = {"name": "b", "max_steps": 10}
    short = tiny(tmp_path, run=half, layout=layout, schedule={"kind": "constant"})
    whole = tiny(tmp_path, run={**half, "max_steps": 20}, layout=layout, schedule={"kind": "constant"})
    straight = tiny(tmp_path, run={"name": "c"}, layout=layout, schedule={"kind": "constant"})
    for config in (short, whole, straight):
        assert on_ranks(train_rank, 2, config) == [0, 0]
    assert same(read(RunFolder.of(whole).checkpoints), read(RunFolder.of(straight).checkpoints))
    one = tiny(tmp_path, run={"name": "d"}, tracking=tracking)
    assert on_ranks(train_rank, 1, one) == [0]
    ours, theirs = (list(read_ledger(RunFolder.of(c).ledger_file)) for c in (tiny(tmp_path, run={"name": "a"}), one))
    losses, expected = ([line["loss"] for line in lines if line["event"] == "step"] for lines in (ours, theirs))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    details = [[line for line in lines if line["event"] == "detail"] for lines in (ours, theirs)]
    assert len(details[0]) == len(details[1]) == 5
    for mine, reference in zip(*details, strict=True):
        for key in ("grad_norm", "update_ratio", "max_attention_logit"):
            np.testing.assert_allclose(list(mine[key].values()), list(reference[key].values()), rtol=2e-5)


@needs_deepspeed
def test_samples_after_training_are_those_of_fsdp(tmp_path: Path) -> None:
    """An untied head's weights are on their way already when logits are asked for: fetched ahead, as in training."""
    said = []
    for engine in ("deepspeed", "fsdp"):
        layout = {"micro_batch": 2, "shard": 2, "engine": engine}
        evaluation = {"every_steps": 5, "prompts": ["ab"], "sample_tokens": 8}
        run = {"name": engine, "max_steps": 10}
        config = tiny(tmp_path, run=run, layout=layout, model={"tied": False}, eval=evaluation)
        assert on_ranks(train_rank, 2, config) == [0, 0]
        files = sorted(RunFolder.of(config).evals.rglob("*.json"))
        said.append([json.loads(file.read_text())["samples"] for file in files])
    assert said[0] == said[1]
    assert len(said[0]) == 2
    assert all(said[0])


@needs_deepspeed
@pytest.mark.parametrize("stage", [few(stage, 3) for stage in STAGES])
def test_nothing_is_written_or_compiled(
    stage: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder, engine="deepspeed", zero_stage=stage)
    monkeypatch.chdir(tmp_path)
    for seen in on_ranks(with_empty_home, 2, config, str(tmp_path)):
        assert seen == []


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 9), (4, 3, 5)])
def test_every_range_is_a_few_boxes_that_hold_it_in_order(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    index = np.arange(count).reshape(shape)
    for first in range(count + 1):
        for last in range(first, count + 1):
            found = zero_slices.boxes(shape, first, last)
            inside = [index[tuple(slice(o, o + n) for o, n in zip(b.offset, b.size, strict=True))] for b in found]
            assert np.array_equal(np.concatenate([box.ravel() for box in inside]), np.arange(first, last))
            assert [b.last - b.first for b in found] == [box.size for box in inside]
            assert len(found) <= 2 * len(shape) - 1


def test_without_deepspeed_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(folder, engine="deepspeed", shard=1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    mesh = Mesh(config.layout, torch.device("cpu"), 0, None)
    with pytest.raises(UserError, match=r"minka\[deepspeed\]"):
        zero.build_zero_engine(config, mesh, lambda name, dims: 0.0)


@pytest.mark.parametrize(
    "layout",
    [
        {"engine": "deepspeed", "replicate": 2},
        {"offload": "optimizer"},
        {"engine": "deepspeed", "zero_stage": 2, "offload": "all"},
    ],
)
def test_what_zero_cannot_run_is_refused(layout: dict[str, Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"set layout"):
        configured(folder, **layout)


def with_nothing_kept(body: Any, *args: Any) -> Any:
    """Without the exception for small parameters, which here would be all of them."""
    zero.PERSISTENT = 0
    return body(*args)


def refusing(config: RunConfig) -> list[dict[str, NDArray[Any]]]:
    """All state of a rank before a refused step, after two of them, and after another step without and with them."""
    seen: list[dict[str, NDArray[Any]]] = []
    with start_mesh(config.layout) as mesh:  # one for both: DeepSpeed keeps the first process group for good
        for refuse in (False, True):
            engine: Any = build_engine(config, mesh)[0]
            for step in range(2):
                engine.forward_backward(*micro_batches(step, mesh))
                take(engine, step)
                if step == 0 and refuse:
                    seen.insert(0, state_of(engine, mesh))
                    engine.forward_backward(*micro_batches(7, mesh))
                    take(engine, 4, accept=False)
                    seen.insert(1, state_of(engine, mesh))
                    engine.forward_backward(micro_batches(8, mesh)[0], math.nan)
                    take(engine, 4)
                    seen.insert(2, state_of(engine, mesh))
            seen.append(state_of(engine, mesh))
    return seen


def state_of(engine: Any, mesh: Mesh) -> dict[str, NDArray[Any]]:
    """Masters and moments of a rank, and what the model computes with its own copy of the weights."""
    state = {key: piece.local.numpy().copy() for key, piece in engine.tensors().items()}
    return state | {"losses": engine.token_losses(micro_batches(9, mesh)[0][0]).numpy()}


def save_trained(config: RunConfig, folder: Path) -> list[float]:
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        for step in range(2):
            engine.forward_backward(*micro_batches(step, mesh))
            take(engine, step)
        save(folder, 2, engine.tensors(), {}, mesh)
        return losses_of(engine, mesh)


def copy(config: RunConfig, source: Path, target: Path) -> list[float]:
    """Restore a checkpoint and save it again; the losses by its weights."""
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        restore_from(checkpoints(source)[-1], engine.tensors(), mesh)
        engine.after_restore()
        save(target, 2, engine.tensors(), {}, mesh)
        return losses_of(engine, mesh)


def losses_of(engine: Any, mesh: Mesh) -> list[float]:
    alone = Mesh(mesh.layout, mesh.device, 0, None)
    assert alone.ranks == mesh.ranks
    rows = micro_batches(9, mesh)[0][0]
    return [float(loss) for loss in engine.token_losses(rows).flatten()[:8]]


def asked(config: RunConfig) -> dict[str, Any]:
    """Losses, logits and norms of a model that is asked before, between and after the halves of a step."""
    found: dict[str, Any] = {}
    with start_mesh(config.layout) as mesh:
        for asks in (True, False):
            engine, optimizer = build_engine(config, mesh)
            row = micro_batches(9, Mesh(config.layout.resolve(1), mesh.device, 0, None), 12)[0][0]
            for step in range(2):
                engine.forward_backward(*micro_batches(step, mesh))
                if asks:
                    found["attention"] = torch.stack(list(engine.attention_logits(row).values())).numpy()
                take(engine, step)
                if asks:
                    found["losses"] = engine.token_losses(row).numpy()
                    found["logits"] = engine.next_logits(row.tokens[:1], 7).numpy()
            found["asked" if asks else "not asked"] = state_of(engine, mesh)
            squares = {n: p.local.double().square().sum() for n, p in engine.weight_pieces().items()}
            found["weights"] = mesh.sum_(torch.stack(list(squares.values()))).numpy()
            found["updates"] = mesh.sum_(torch.stack(list(optimizer.update_squares(1e-3).values()))).numpy()
    return found


def with_empty_home(config: RunConfig, home: str) -> list[str]:
    """Files that have appeared under `home`, where everything that has a place by default has it."""
    import os

    for name in ("HOME", "TMPDIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        os.environ[name] = home
    trained(config)
    return [str(path) for path in Path(home).rglob("*")]
