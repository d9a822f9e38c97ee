"""A layout is legal or refused with the axis, the reason and what would work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import AVAILABLE_AXES, AXES, Layout, check_layout

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


@given(replicate=WAYS, shard=st.integers(0, 6), ranks=st.integers(1, 40))
def test_a_layout_resolves_to_exactly_the_ranks_there_are_or_is_refused(replicate: int, shard: int, ranks: int) -> None:
    asked = Layout(replicate=replicate, shard=shard)
    fits = ranks % replicate == 0 if shard == 0 else replicate * shard == ranks
    if fits:
        assert asked.resolve(ranks).world == ranks
        return
    with pytest.raises(UserError) as refusal:
        asked.resolve(ranks)
    assert refusal.value.status is ExitStatus.REFUSED
    assert f"{ranks} were started" in refusal.value.what
    assert refusal.value.remedy


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_runs_or_is_refused_by_name(axis: str) -> None:
    layout = Layout.model_validate({axis: 2})
    if axis in AVAILABLE_AXES:
        check_layout(layout)
        return
    with pytest.raises(UserError) as refusal:
        check_layout(layout)
    assert refusal.value.where == f"layout.{axis}"
    assert f"{axis}=2" in refusal.value.what
    assert f"layout.{axis}=1" in refusal.value.remedy


@pytest.mark.parametrize("field", sorted(Layout.model_fields))
def test_a_layout_is_frozen(field: str) -> None:
    layout = Layout()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(layout, field, getattr(layout, field))


def test_a_layout_knows_no_other_key() -> None:
    with pytest.raises(ValidationError, match="sharded"):
        Layout.model_validate({"sharded": 2})
