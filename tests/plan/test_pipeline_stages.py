"""Which rank has which layers of a pipeline: all of them, once, and balanced by cost."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.layout import STAGES_PER_RANK, Layout
from minka.plan.load_config import load_run, recipe_names
from minka.plan.pipeline_stages import balanced, costs, stages_of


@given(pipeline=st.integers(1, 4), schedule=st.sampled_from(sorted(STAGES_PER_RANK)), many=st.sampled_from([0, 2, 3]))
def test_every_stage_is_on_one_rank_and_every_rank_has_equally_many(pipeline: int, schedule: str, many: int) -> None:
    given_ = many if schedule == "interleaved" else 0
    layout = Layout.model_validate({"pipeline": pipeline, "schedule": schedule, "stages_per_rank": given_, "shard": 1})
    held = [layout.stages_of_rank(rank) for rank in range(pipeline)]
    assert sorted(stage for stages in held for stage in stages) == list(range(layout.stage_count))
    assert len({len(stages) for stages in held}) == 1
    if layout.splits_backward:
        assert held == [[r, 2 * pipeline - 1 - r] for r in range(pipeline)]


@pytest.mark.parametrize("recipe", recipe_names())
def test_balanced_stages_are_as_good_as_any_split(recipe: str) -> None:
    config = load_run(recipe, ["model.tied=false"]).config
    layer, end = costs(config.model)
    for stages in range(2, min(4, config.model.layers) + 1):
        found = balanced(config.model.layers, stages, layer, end)
        assert sum(found) == config.model.layers
        assert min(found) >= 1
        best = min(dearest(counts, layer, end) for counts in splits(config.model.layers, stages))
        assert dearest(found, layer, end) == best


def dearest(counts: Sequence[int], layer: int, end: int) -> int:
    last = len(counts) - 1
    return max(count * layer + end * ((i == 0) + (i == last)) for i, count in enumerate(counts))


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


def test_stages_can_be_given() -> None:
    model = load_run("demo", ["model.layers=8"]).config.model
    assert stages_of(Layout(pipeline=2, stages="5,3"), model) == [range(5), range(5, 8)]
    assert stages_of(Layout(), model) == [range(8)]
