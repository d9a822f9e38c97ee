"""`minka plan memory` against dry runs: layouts drawn at random, and the published sizes at their real depth."""

import random
from typing import Any

import pytest

from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.memory import predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.train.dry_run import dry_run

QUIET = ["kernels.compile=false", "data.batch_warmup=[]", "run.max_tokens=none", "run.max_steps=9"]
QUIET += ["schedule.unit=steps", "schedule.warmup=0", "schedule.decay=0"]
MEAN, UNDER, OVER = 0.01, -0.03, 0.05


def drawn(seed: int) -> tuple[str, list[str], int]:
    """A recipe of few layers, overrides, and ranks."""
    pick = random.Random(seed).choice
    ways = {"tensor": pick([1, 1, 2, 4]), "context": pick([1, 1, 2]), "shard": pick([1, 2, 8, 32])}
    ways["replicate"] = pick([1, 1, 2])
    recipe, rows, steps = pick(["dense-125m", "dense-1b", "llama3-8b"]), pick([1, 2, 4]), pick([1, 2, 5])
    precision = pick(["bf16", "bf16", "fp32"])
    weights = pick(["fp32", "fp32", "bf16"]) if precision == "bf16" else "fp32"
    reduce = pick(["step", "step", "micro_batch"]) if weights == "fp32" else "step"
    length = 4096 if recipe == "llama3-8b" else 2048
    settings = {f"layout.{axis}": value for axis, value in ways.items()} | {
        "layout.micro_batch": rows,
        "layout.recompute": pick(["none", "block", "selective"]),
        "layout.reshard": pick(["auto", "always", "never"]),
        "layout.reduce": reduce,
        "layout.precision": precision,
        "optimizer.weights": weights,
        "model.layers": pick([4, 8]),
        "data.seq_len": length,
        "data.batch_tokens": length * rows * steps * ways["shard"] * ways["replicate"],
    }
    world = ways["tensor"] * ways["context"] * ways["shard"] * ways["replicate"]
    return recipe, [*QUIET, *(f"{key}={value}" for key, value in settings.items())], world


def compared(recipe: str, overrides: list[str], world: int) -> float:
    config = load_run(recipe, overrides).config
    predicted, traced = predict_memory(config, world), dry_run(config, world, 0).memory
    error = predicted.total / traced.total - 1
    kinds = {k: (predicted.by_kind[k] - traced.by_kind[k]) / traced.total for k in MEMORY_KINDS}
    worst = max(kinds, key=lambda kind: abs(kinds[kind]))
    print(f"{error:+.2%} at {predicted.moment}, {worst} {kinds[worst]:+.2%}: {recipe}, {world} ranks, {overrides}")
    return error


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 46), marks=pytest.mark.slow)], ids=["6", "40"])
def test_layouts_drawn_at_random(seeds: range) -> None:
    errors = [compared(*drawn(seed)) for seed in seeds]
    print(f"mean {sum(map(abs, errors)) / len(errors):.2%}, from {min(errors):+.2%} to {max(errors):+.2%}")
    assert sum(map(abs, errors)) / len(errors) <= MEAN
    assert min(errors) >= UNDER
    assert max(errors) <= OVER


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "world"), [("llama3-8b", 8), ("llama3-8b", 256), ("llama3-70b", 256)])
def test_published_sizes(recipe: str, world: int) -> None:
    error = compared(recipe, ["kernels.compile=false", "layout.pipeline=1"], world)
    assert UNDER <= error <= -UNDER


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["layout.pipeline=2"], "layout.pipeline"),
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
        held.append(predict_memory(load_run("llama3-8b", overrides).config, ways).by_kind)
    for more, fewer in zip(held[1:], held[:-1], strict=True):
        assert more["weights"] < fewer["weights"]
        assert more["optimizer"] < fewer["optimizer"]


def test_longer_sequences_never_hold_less() -> None:
    held = []
    for length in (512, 1024, 2048, 4096, 8192):
        overrides = [f"data.seq_len={length}", f"data.batch_tokens={8 * length}"]
        held.append(predict_memory(load_run("llama3-8b", overrides).config, 8).total)
    assert held == sorted(held)
