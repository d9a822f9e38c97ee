"""The order of a pipeline's passes is that of torch.distributed.pipelining's schedules, and so is what is gathered."""

from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from minka.plan.layout import STAGES_PER_RANK, Layout, micro_batches_fit
from minka.plan.pipeline_passes import passes

KINDS = {
    "UNSHARD": "gather",
    "RESHARD": "free",
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "backward_inputs",
    "BACKWARD_WEIGHT": "backward_weights",
    "REDUCE_GRAD": "reduce",
}
SCHEDULES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


def torch_passes(layout: Layout, coordinate: int, count: int) -> list[tuple[str, int]]:
    """What torch's schedule runs; made without its constructor, which wants stages and a process group."""
    schedule: Any = object.__new__(SCHEDULES[layout.schedule])
    actions: Any
    schedule._n_microbatches, schedule.pp_group_size = count, layout.pipeline
    schedule._num_stages = schedule.num_stages = layout.stage_count
    schedule.n_local_stages = layout.stage_count // layout.pipeline
    schedule.number_of_rounds = max(1, count // layout.pipeline)
    schedule.microbatches_per_round = count // schedule.number_of_rounds
    if layout.schedule in ("gpipe", "1f1b"):
        actions = [one for one in schedule._get_pipeline_order()[coordinate] if one.computation_type.name in KINDS]
        actions = [one for one in actions if one.computation_type.name != "REDUCE_GRAD"]
    else:
        actions = schedules._add_unshard_reshard(schedule._calculate_single_rank_operations(coordinate))
    actions = schedules._add_reduce_grad(actions, count)
    parts = [part for one in actions for part in (one.sub_actions or (one,))]
    return [(KINDS[part.computation_type.name], part.stage_index) for part in parts]


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_the_order_is_that_of_torch(schedule: str, pipeline: int) -> None:
    compared = 0
    for per_rank in (2, 3, 4) if schedule == "interleaved" else (0,):
        given = {"pipeline": pipeline, "schedule": schedule, "stages_per_rank": per_rank, "shard": 1}
        layout = Layout.model_validate(given)
        for count in filter(lambda n: micro_batches_fit(layout, n), range(1, 4 * pipeline + 3)):
            for coordinate in range(pipeline):
                found: list[tuple[str, int]] = [(one.kind, one.stage) for one in passes(layout, coordinate, count)]
                assert _sorted(found) == _sorted(torch_passes(layout, coordinate, count)), (layout, count, coordinate)
                compared += 1
    assert compared >= pipeline


def _sorted(order: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The order, with gathers and frees between two passes sorted; frees after the last pass are left out."""
    found: list[tuple[str, int]] = []
    between: list[tuple[str, int]] = []
    for one in order:
        if one[0] in ("gather", "free"):
            between.append(one)
        else:
            found += [*sorted(between), one]
            between = []
    return found
