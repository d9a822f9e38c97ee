"""`minka plan memory` against dry runs: layouts drawn at random, and the published sizes at their real depth."""

import random
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest

from minka.benchmarks.memory_layouts import SHARES, drawn
from minka.plan import memory_pipeline
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.memory import predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.train.dry_run import dry_run
from traced import UNIT_BYTES, config_of, dry, planned

MEAN, UNDER, OVER = 0.01, -0.03, 0.05
KIND = 0.05  # of the peak


def compared(recipe: str, overrides: list[str], world: int, coordinates: Sequence[int] = (0,)) -> list[float]:
    """Errors of the totals; what is wrong by more than KIND in one kind is printed as such."""
    config = load_run(recipe, overrides).config
    found, errors = predict_memory(config, world), list[float]()
    for one in [found[coordinate] for coordinate in coordinates]:
        traced = dry_run(config, world, one.rank).memory
        errors.append(one.total / traced.total - 1)
        kinds = {k: (one.by_kind[k] - traced.by_kind[k]) / traced.total for k in MEMORY_KINDS}
        worst = max(kinds, key=lambda kind: abs(kinds[kind]))
        said = f"{errors[-1]:+.2%} at {one.moment}, {worst} {kinds[worst]:+.2%}"
        print(f"{said}{' (!)' * (abs(kinds[worst]) > KIND)}: {recipe}, rank {one.rank} of {world}, {overrides[7:]}")
    return errors


def check(errors: Sequence[float]) -> None:
    mean = sum(map(abs, errors)) / len(errors)
    print(f"{len(errors)} ranks, mean {mean:.2%}, from {min(errors):+.2%} to {max(errors):+.2%}")
    assert mean <= MEAN
    assert min(errors) >= UNDER
    assert max(errors) <= OVER


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 43), marks=pytest.mark.slow)], ids=["3", "40"])
def test_layouts_drawn_at_random(seeds: range) -> None:
    check([error for seed in seeds for error in compared(*drawn(seed))])


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(6, 46), marks=pytest.mark.slow)], ids=["4", "40"])
def test_small_models_on_cores(seeds: range) -> None:
    """Where no block is an FSDP unit, or all of them are one."""
    errors = []
    for seed in seeds:
        pick = random.Random(seed).choice
        layout: dict[str, Any] = {axis: pick([1, 1, 2]) for axis in ("tensor", "context", "replicate")}
        layout |= {"shard": pick([1, 2, 4]), "micro_batch": pick([1, 2, 4]), "precision": pick(["auto", "bf16"])}
        layout |= {"recompute": pick(["none", "block", "selective"]), "reshard": pick(["auto", "always", "never"])}
        model = {"layers": pick([2, 4, 6]), "vocab": pick([512, 2048]), "d_model": pick([128, 256])}
        config = config_of(layout, **model, tied=pick([True, False]), qk_norm=pick([True, False]))
        unit_bytes = pick([UNIT_BYTES, 2**22])
        (found,) = planned(config, unit_bytes=unit_bytes)
        traced = dry(config, 0, unit_bytes=unit_bytes).memory
        errors.append(found.total / traced.total - 1)
        print(f"{errors[-1]:+.2%} at {found.moment}: {layout}, {model}")
    assert sum(map(abs, errors)) / len(errors) <= 0.03
    assert min(errors) >= UNDER
    assert max(errors) <= 0.08


@pytest.mark.parametrize(
    "seeds",
    [range(1), *(pytest.param(range(first, first + 10), marks=pytest.mark.slow) for first in (2, 12, 22))],
    ids=["1", "first 10", "second 10", "third 10"],
)
def test_pipelines_drawn_at_random(seeds: range) -> None:
    """The first, a middle and the last coordinate of each."""
    errors = []
    for seed in seeds:
        recipe, overrides, world = drawn(seed, pipeline=True)
        pipeline = load_run(recipe, overrides).config.layout.pipeline
        errors += compared(recipe, overrides, world, sorted({0, pipeline // 2, pipeline - 1}))
    check(errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "world", "coordinates"), [("llama3-8b", 8, (0,)), ("llama3-8b", 256, (0,)), ("llama3-70b", 256, (0, 3))]
)
def test_published_sizes(recipe: str, world: int, coordinates: tuple[int, ...]) -> None:
    for error in compared(recipe, ["kernels.compile=false"], world, coordinates):
        assert UNDER <= error <= -UNDER


@pytest.mark.slow
def test_a_pipeline_of_70_billion_weights_on_one_coordinate() -> None:
    (error,) = compared("llama3-70b", ["kernels.compile=false", "layout.pipeline=1"], 256)
    assert UNDER <= error <= -UNDER


@pytest.mark.long
def test_405_billion_weights_on_16384_ranks() -> None:
    for error in compared("llama3-405b", ["kernels.compile=false"], 16384, (0, 1, 15)):
        assert UNDER <= error <= -UNDER


def test_a_step_of_many_micro_batches_costs_no_more_time() -> None:
    """From some number on, each further micro-batch of a pipeline adds the same."""
    for schedule in SHARES:
        found = []
        for count in (64, 80, 96):
            overrides = [f"layout.schedule={schedule}", f"data.batch_tokens={8192 * count}", "layout.shard=1"]
            overrides += ["layout.pipeline=2", "data.batch_warmup=[]", "kernels.compile=false", "layout.recompute=none"]
            config = load_run("llama3-8b", overrides).config
            found.append([one.total for one in predict_memory(config, 2)])
            with patch.object(memory_pipeline, "micro_batches_fit", lambda *_: False):  # each micro-batch is run
                assert [one.total for one in predict_memory(config, 2)] == found[-1]
        few, more, most = (sum(totals) for totals in found)
        assert most - more == more - few > 0


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["layout.engine=deepspeed", "kernels.compile=false"], "layout.engine"),
        (["layout.offload=all"], "layout.offload"),
        (["layout.tensor=3"], "layout"),
    ],
)
def test_what_is_not_predicted_is_refused(overrides: list[str], where: str) -> None:
    with pytest.raises(UserError) as refusal:
        predict_memory(load_run("llama3-8b", overrides).config, 8)
    assert str(refusal.value.where).startswith(where)


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_more_ranks_never_hold_more(axis: str) -> None:
    held: list[Any] = []
    for ways in (1, 2, 4, 8):
        tokens = 8192 * (ways if axis == "shard" else 1)
        overrides = [f"layout.{axis}={ways}", f"data.batch_tokens={tokens}", "data.batch_warmup=[]"]
        overrides += ["layout.shard=1"] if axis == "tensor" else []
        held.append(predict_memory(load_run("llama3-8b", overrides).config, ways)[0].by_kind)
    for more, fewer in zip(held[1:], held[:-1], strict=True):
        assert more["weights"] < fewer["weights"]
        assert more["optimizer"] < fewer["optimizer"]


def test_longer_sequences_never_hold_less() -> None:
    held = []
    for length in (512, 1024, 2048, 4096, 8192):
        overrides = [f"data.seq_len={length}", f"data.batch_tokens={8 * length}"]
        held.append(predict_memory(load_run("llama3-8b", overrides).config, 8)[0].total)
    assert held == sorted(held)
