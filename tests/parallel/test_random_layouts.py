"""Random legal layouts: each gives the single-device run."""

from random import Random
from typing import Any

import pytest

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import STAGES_PER_RANK
from parity import BOUNDS, EXACT, check, config_of, differences, run_on

DRAWS, EACH = 50, 5


def drawn(dice: Random) -> RunConfig:
    """A legal layout of 2 to 8 ranks, and a model it is tried on."""
    while True:
        axes = {axis: dice.choice([1, 1, 2, 3, 4]) for axis in ("replicate", "shard", "context", "tensor")}
        axes["pipeline"] = dice.choice([1, 2, 2, 3, 4])  # the axis with most rules: many draws of it are refused
        layout: dict[str, Any] = {
            **axes,
            "schedule": dice.choice(sorted(STAGES_PER_RANK)),
            "recompute": dice.choice(["none", "none", "selective", "block"]),
            "reshard": dice.choice(["auto", "always", "never"]),
            "offload": dice.choice(["none", "none", "all"]),
        }
        if axes["pipeline"] == 1:
            layout["reduce"] = dice.choice(["step", "micro_batch"])
        if layout["schedule"] == "interleaved":
            layout["stages_per_rank"] = dice.choice([0, 2, 3])
        model = {
            "layers": dice.choice([4, 5, 8]),
            "tied": dice.random() < 0.3,
            "qk_norm": dice.random() < 0.3,
            "qkv_bias": dice.random() < 0.3,
            "kv_heads": dice.choice([2, 4, 8]),
        }
        try:
            config = config_of(layout, model, checkpoint={"export": False})
        except UserError:
            continue
        if 2 <= config.layout.world <= 8 and 8 % config.layout.data_ways == 0:
            return config


@pytest.mark.parametrize(
    ("group", "each"), [(0, 2), *(pytest.param(n, EACH, marks=pytest.mark.slow) for n in range(DRAWS // EACH))]
)
def test_any_legal_layout_is_the_single_device_run(group: int, each: int) -> None:
    dice = Random(group)
    for _ in range(each):
        config = drawn(dice)
        given = config.layout.model_dump(exclude_defaults=True)
        shape = config.model.model_dump(exclude_unset=True)
        # The one process is in fp64: where a gradient nearly cancels (key biases, QK norms) one in fp32 rounds as much
        # as the layout does, and the two together may go beyond the bound. In fp64 itself nothing but rounding is left.
        one = run_on(config_of({"precision": "fp64"}, shape, checkpoint={"export": False}), steps=2)
        for precision, bounds in (("fp32", BOUNDS), ("fp64", EXACT)):
            layout = config.layout.model_copy(update={"precision": precision})
            found = differences(run_on(config.model_copy(update={"layout": layout}), steps=2), one)
            check(found, f"{precision} {given} {config.model}", bounds)


def test_draws_are_of_many_kinds() -> None:
    configs = [drawn(dice) for dice in map(Random, range(DRAWS // EACH)) for _ in range(EACH)]
    assert len(configs) == DRAWS
    for axis in ("pipeline", "replicate", "shard", "context", "tensor"):
        assert sum(getattr(config.layout, axis) > 1 for config in configs) >= 5, axis
    for key, value in (("reduce", "micro_batch"), ("offload", "all"), ("reshard", "always"), ("recompute", "block")):
        assert sum(getattr(config.layout, key) == value for config in configs) >= 5, key
    assert {config.layout.schedule for config in configs if config.layout.pipeline > 1} == set(STAGES_PER_RANK)
