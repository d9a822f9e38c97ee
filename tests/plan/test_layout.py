"""A layout is legal or refused with the axis, the reason and what would work."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import Layout
from minka.plan.layout_rules import RULES, Asked
from minka.plan.load_config import validate

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


class Refused(NamedTuple):
    """A combination that cannot be run: the setting to blame, words of the reason, and overrides that mend it."""

    sections: dict[str, dict[str, Any]]
    key: str
    why: str
    mended: dict[str, dict[str, Any]]


REFUSED = {
    "tensor and key/value heads": Refused(
        {"layout": {"tensor": 8}}, "tensor", "whole query and key/value heads", {"layout": {"tensor": 4}}
    ),
    "tensor and query heads": Refused(
        {"layout": {"tensor": 4}, "model": {"heads": 6, "kv_heads": 2}}, "tensor", "whole", {"layout": {"tensor": 2}}
    ),
    "tensor and feed-forward width": Refused(
        {"layout": {"tensor": 4}, "model": {"d_ff": 90}}, "tensor", "columns", {"layout": {"tensor": 2}}
    ),
    "tensor and vocabulary": Refused(
        {"layout": {"tensor": 4}, "model": {"vocab": 257}, "data": {"tokenizer": "bpe"}},
        "tensor",
        "rows",
        {"model": {"vocab": 260}},
    ),
    "context and sequence length": Refused(
        {"layout": {"context": 3}}, "context", "head and one from the tail", {"layout": {"context": 4}}
    ),
    "tensor and the tokens of a rank": Refused(
        {"layout": {"context": 1, "tensor": 4}, "data": {"seq_len": 62, "batch_tokens": 62 * 8}},
        "tensor",
        "share a sequence's tokens",
        {"layout": {"tensor": 2}},
    ),
    "pipeline and tied embeddings": Refused(
        {"layout": {"pipeline": 2}, "model": {"tied": True}}, "pipeline", "two stages", {"model": {"tied": False}}
    ),
    "one stage a rank in a schedule of two": Refused(
        {"layout": {"pipeline": 2, "schedule": "zbv", "stages_per_rank": 1}},
        "stages_per_rank",
        "2 stages",
        {"layout": {"stages_per_rank": 2}},
    ),
    "two stages a rank in a schedule of one": Refused(
        {"layout": {"pipeline": 2, "stages_per_rank": 2}},
        "stages_per_rank",
        "1 stage",
        {"layout": {"schedule": "interleaved"}},
    ),
    "one stage a rank interleaved": Refused(
        {"layout": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 1}},
        "stages_per_rank",
        "at least 2 stages",
        {"layout": {"stages_per_rank": 2}},
    ),
    "more stages than layers": Refused(
        {"layout": {"pipeline": 8, "schedule": "dualpipev"}},
        "pipeline",
        "every stage needs a layer",
        {"layout": {"pipeline": 4}},
    ),
    "stages that do not add up": Refused(
        {"layout": {"pipeline": 2, "stages": "4,3"}},
        "stages",
        "the layers of each stage",
        {"layout": {"stages": "5,3"}},
    ),
    "stages that are too many": Refused(
        {"layout": {"pipeline": 2, "stages": "4,3,1"}}, "stages", "in the order", {"layout": {"stages": "4,4"}}
    ),
    "an empty stage": Refused(
        {"layout": {"pipeline": 2, "stages": "8,0"}}, "stages", "at least one", {"layout": {"stages": "7,1"}}
    ),
    "stages in words": Refused(
        {"layout": {"pipeline": 2, "stages": "half,half"}}, "stages", "at least one", {"layout": {"stages": ""}}
    ),
    "split backward with resharding": Refused(
        {"layout": {"pipeline": 2, "schedule": "dualpipev", "reshard": "always"}},
        "reshard",
        "wrong without an error",
        {"layout": {"reshard": "never"}},
    ),
    "split backward with compiled blocks": Refused(
        {"layout": {"pipeline": 2, "schedule": "zbv"}, "kernels": {"compile": True}},
        "schedule",
        "wrong without an error",
        {"kernels": {"compile": False}},
    ),
    "1f1b with few micro-batches": Refused(
        {"layout": {"pipeline": 4, "micro_batch": 4}},
        "schedule",
        "as many as there are stages",
        {"layout": {"micro_batch": 2}},
    ),
    "dualpipev with few micro-batches": Refused(
        {"layout": {"pipeline": 2, "schedule": "dualpipev", "micro_batch": 4}},
        "schedule",
        "as many as there are stages",
        {"layout": {"micro_batch": 2}},
    ),
    "interleaved with some numbers of micro-batches": Refused(
        {"layout": {"pipeline": 2, "schedule": "interleaved"}, "data": {"batch_tokens": 5 * 64}},
        "schedule",
        "multiple of 2",
        {"data": {"batch_tokens": 6 * 64}},
    ),
    "deepspeed with copies": Refused(
        {"layout": {"engine": "deepspeed", "replicate": 2}},
        "replicate",
        "no copies",
        {"layout": {"replicate": 1}},
    ),
    "deepspeed with a pipeline": Refused(
        {"layout": {"engine": "deepspeed", "pipeline": 2}}, "pipeline", "ZeRO", {"layout": {"engine": "fsdp"}}
    ),
    "deepspeed with context": Refused(
        {"layout": {"engine": "deepspeed", "context": 2}}, "context", "ZeRO", {"layout": {"context": 1}}
    ),
    "deepspeed with tensor": Refused(
        {"layout": {"engine": "deepspeed", "tensor": 2}}, "tensor", "already cut", {"layout": {"tensor": 1}}
    ),
    "moments offloaded by FSDP": Refused(
        {"layout": {"offload": "optimizer"}}, "offload", "together", {"layout": {"offload": "all"}}
    ),
    "weights offloaded that are not cut": Refused(
        {"layout": {"engine": "deepspeed", "zero_stage": 2, "offload": "all"}},
        "offload",
        "whole on the device",
        {"layout": {"zero_stage": 3}},
    ),
    "deepspeed in fp64": Refused(
        {"layout": {"engine": "deepspeed", "precision": "fp64"}}, "precision", "fp32", {"layout": {"precision": "fp32"}}
    ),
    "deepspeed with resharding": Refused(
        {"layout": {"engine": "deepspeed", "reshard": "never"}}, "reshard", "the stage", {"layout": {"reshard": "auto"}}
    ),
    "deepspeed with a time to reduce": Refused(
        {"layout": {"engine": "deepspeed", "reduce": "micro_batch"}},
        "reduce",
        "the stage",
        {"layout": {"reduce": "step"}},
    ),
    "a pipeline that reduces each micro-batch": Refused(
        {"layout": {"pipeline": 2, "reduce": "micro_batch"}}, "reduce", "its last", {"layout": {"reduce": "step"}}
    ),
    "compiled blocks under ZeRO stage 3": Refused(
        {"layout": {"engine": "deepspeed"}, "kernels": {"compile": True}},
        "zero_stage",
        "hooks",
        {"layout": {"zero_stage": 2}},
    ),
    "selective recomputation under ZeRO stage 3": Refused(
        {"layout": {"engine": "deepspeed", "recompute": "selective"}},
        "recompute",
        "hooks",
        {"layout": {"zero_stage": 2}},
    ),
    "few micro-batches in a warm-up": Refused(
        {"layout": {"pipeline": 4}, "data": {"batch_warmup": [{"until_tokens": 640, "batch_tokens": 128}]}},
        "schedule",
        "as many as there are stages",
        {"layout": {"schedule": "gpipe"}},
    ),
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
    assert error.where == f"layout.{row.key}"
    assert row.why in error.why
    assert error.remedy
    config_of(row.sections, row.mended)  # what the remedy says does work


def test_every_rule_is_broken_by_a_row() -> None:
    broken = set()
    for row in REFUSED.values():
        with pytest.raises(UserError):
            config_of(row.sections)
        values = config_of(*({s: f for s, f in row.sections.items() if s not in ("layout", "kernels")},))
        layout = values.layout.model_copy(update=row.sections.get("layout", {}))
        kernels = values.kernels.model_copy(update=row.sections.get("kernels", {}))
        asked = Asked(layout, values.model, values.data, kernels)
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
