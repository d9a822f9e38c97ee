"""How long a pipeline waits, against its passes played one after the other."""

from collections import Counter

import pytest

from minka.plan.bubble import StageSeconds, bubble_seconds, busy_seconds
from minka.plan.layout import Layout
from minka.plan.pipeline_passes import passes

Done = dict[tuple[str, int, int], float]  # (kind, stage, micro-batch) -> when


def played(layout: Layout, stages: list[StageSeconds], count: int) -> float:
    """Seconds until the last pass of any rank, each pass waiting for what it needs."""
    orders = [
        [one for one in passes(layout, rank, count) if one.kind.startswith(("forward", "backward"))]
        for rank in range(layout.pipeline)
    ]
    done: Done = {}
    clocks, at = [0.0] * layout.pipeline, [0] * layout.pipeline
    seen = [Counter[tuple[str, int]]() for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                kind, stage = order[at[rank]]
                number = seen[rank][kind, stage]
                if kind.startswith("backward") and kind != "backward_weights":
                    number = seen[rank]["backward", stage]
                ready = needs(done, kind, stage, number, len(stages))
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + seconds_of(stages[stage], kind)
                name = "backward" if kind in ("backward", "backward_inputs") else kind
                seen[rank][name, stage] += 1
                done[name, stage, number] = clocks[rank]
                at[rank], moved = at[rank] + 1, True
    assert all(place == len(order) for place, order in zip(at, orders, strict=True)), "the order cannot be run"
    return max(clocks)


def needs(done: Done, kind: str, stage: int, number: int, count: int) -> float | None:
    if kind == "backward_weights":
        return 0.0
    if kind == "forward":
        return done.get(("forward", stage - 1, number)) if stage else 0.0
    if stage == count - 1:
        return done.get(("forward", stage, number))
    return done.get(("backward", stage + 1, number))


def seconds_of(stage: StageSeconds, kind: str) -> float:
    return {
        "forward": stage.forward,
        "backward": stage.inputs + stage.weights,
        "backward_inputs": stage.inputs,
        "backward_weights": stage.weights,
    }[kind]


@pytest.mark.parametrize(
    "stage", [StageSeconds(1, 1, 1), StageSeconds(1, 1.3, 1), StageSeconds(1, 1, 0.7), StageSeconds(1, 2.2, 1)], ids=str
)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_equal_stages_wait_as_long_as_their_passes_played(schedule: str, ranks: int, stage: StageSeconds) -> None:
    """To the last bit but for DualPipeV, whose order has gaps that depend on the ratios: within 4 % of the step."""
    layout = Layout(pipeline=ranks, shard=1, schedule=schedule)  # type: ignore[arg-type]
    stages, count = [stage] * layout.stage_count, 4 * ranks
    predicted = count * max(busy_seconds(layout, stages)) + bubble_seconds(layout, stages, count)
    found = played(layout, stages, count)
    assert predicted == pytest.approx(found, rel=0.04 if schedule == "dualpipev" else 1e-9)


@pytest.mark.parametrize("count", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("schedule", "stages"), [("gpipe", 1), ("interleaved", 2), ("interleaved", 7), ("zbv", 2)])
def test_few_micro_batches_wait_for_each_other(schedule: str, stages: int, count: int) -> None:
    """A round through all stages takes as long as one micro-batch does, however few there are."""
    layout = Layout(pipeline=8, shard=1, schedule=schedule, stages_per_rank=stages)  # type: ignore[arg-type]
    each = [StageSeconds(1, 1.2, 0.9)] * layout.stage_count
    predicted = count * max(busy_seconds(layout, each)) + bubble_seconds(layout, each, count)
    assert predicted == pytest.approx(played(layout, each, count), rel=0.06 if schedule == "zbv" else 1e-9)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_a_heavier_last_stage_is_waited_for(schedule: str) -> None:
    layout = Layout(pipeline=4, shard=1, schedule=schedule)  # type: ignore[arg-type]
    stages = [StageSeconds(1, 1, 1)] * (layout.stage_count - 1) + [StageSeconds(1.2, 1.2, 1.2)]
    predicted = 16 * max(busy_seconds(layout, stages)) + bubble_seconds(layout, stages, 16)
    assert predicted == pytest.approx(played(layout, stages, 16), rel=0.03)


def test_no_pipeline_waits_for_nobody() -> None:
    assert bubble_seconds(Layout(shard=1), [StageSeconds(1, 1, 1)], 4) == 0
