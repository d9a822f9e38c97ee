"""A layout is legal or refused with the axis, the reason and what would work."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import Layout
from minka.plan.layout_rules import RULES, Asked
from minka.plan.load_config import validate
from refused_layouts import REFUSED

WAYS = st.integers(1, 6)


@given(replicate=WAYS, shard=WAYS, tensor=WAYS, context=WAYS, pipeline=WAYS)
def test_shard_zero_takes_all_ranks_that_are_left(**ways: int) -> None:
    asked = Layout.model_validate(ways | {"shard": 0})
    whole = Layout.model_validate(ways)
    world = whole.world
    resolved = asked.resolve(world)
    assert resolved == whole
    assert resolved.world == world
    assert resolved.data_ways == ways["replicate"] * ways["shard"]


@given(replicate=WAYS, shard=st.integers(0, 6), ranks=st.integers(1, 40) | st.integers(990, 1010))
def test_a_layout_resolves_to_exactly_the_ranks_there_are_or_is_refused(replicate: int, shard: int, ranks: int) -> None:
    asked = Layout(replicate=replicate, shard=shard)
    fits = ranks % replicate == 0 if shard == 0 else replicate * shard == ranks
    if fits:
        assert asked.resolve(ranks).world == ranks
        return
    with pytest.raises(UserError) as refusal:
        asked.resolve(ranks)
    assert refusal.value.status is ExitStatus.REFUSED
    assert f"{ranks:,}" in refusal.value.what
    offered = re.split(" ranks?", refusal.value.remedy)[0].removeprefix("works: ").replace(",", "").split(" or ")
    for number in map(int, offered):  # it offers the nearest numbers that will do
        assert asked.resolve(number).world == number
    if shard == 0:
        assert any(number > ranks for number in map(int, offered))


def test_a_long_list_of_ways_is_shortened() -> None:
    with pytest.raises(UserError) as refusal:
        Layout(tensor=7, pipeline=11).resolve(65_536 * 9)
    assert "589,820 or 589,897" in refusal.value.remedy
    assert refusal.value.remedy.endswith("1, 2, 3, 4, 6, 8, 9, 12, ..., 196,608, 294,912, 589,824")
    with pytest.raises(UserError, match="needs 1 rank, not 2"):
        Layout(shard=1).resolve(2)


BASE: dict[str, dict[str, Any]] = {
    "run": {"name": "r", "max_steps": 10},
    "model": {"layers": 8, "d_model": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "d_ff": 96, "vocab": 256},
    "data": {"tokenizer": "bytes", "seq_len": 64, "batch_tokens": 8 * 64},
    "optimizer": {"learning_rate": 1e-3},
}


def config_of(*layers: dict[str, dict[str, Any]]) -> RunConfig:
    """BASE with sections laid over it, one after the other, on one data rank unless they say otherwise."""
    values: dict[str, dict[str, Any]] = {"layout": {"shard": 1}, "checkpoint": {"export": False}}
    for sections in (BASE, *layers):
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields}
    return validate(values, "test")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_with_its_reason_and_what_would_work(case: str) -> None:
    row = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        config_of(row.sections)
    error = refusal.value
    assert error.status is ExitStatus.REFUSED
    assert error.where == (row.key if "." in row.key else f"layout.{row.key}")
    assert not re.search("engine='deepspeed' cannot be run by DeepSpeed", error.what)
    assert row.why in error.why
    assert error.remedy
    config_of(row.sections, row.mended)  # what the remedy says does work


def test_every_rule_is_broken_by_a_row() -> None:
    broken = set()
    for row in REFUSED.values():
        with pytest.raises(UserError):
            config_of(row.sections)
        own = ("layout", "kernels", "optimizer")
        values = config_of(*({s: f for s, f in row.sections.items() if s not in own},))
        layout = values.layout.model_copy(update=row.sections.get("layout", {}))
        kernels = values.kernels.model_copy(update=row.sections.get("kernels", {}))
        optimizer = values.optimizer.model_copy(update=row.sections.get("optimizer", {}))
        asked = Asked(layout, values.model, values.data, kernels, optimizer)
        broken.add(next(rule for rule in RULES if rule.broken(asked)))
    assert broken == set(RULES)


def test_the_docs_list_every_refused_combination(root: Path) -> None:
    text = (root / "docs/parallelism.md").read_text()
    for case in REFUSED:
        assert f"| {case} |" in text, case


@pytest.mark.parametrize("field", sorted(Layout.model_fields))
def test_a_layout_is_frozen(field: str) -> None:
    layout = Layout()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(layout, field, getattr(layout, field))


def test_a_layout_knows_no_other_key() -> None:
    with pytest.raises(ValidationError, match="sharded"):
        Layout.model_validate({"sharded": 2})
