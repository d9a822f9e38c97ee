"""The order in which a pipeline coordinate runs its passes: that of torch.distributed.pipelining's schedules.

tests/plan/test_pipeline_passes.py compares the two.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from minka.plan.layout import Layout

Kind = Literal["gather", "free", "forward", "backward", "backward_inputs", "backward_weights", "reduce"]
ACTIVE_STAGES = 3  # whose weights are gathered at once, where a rank has several
Stages = tuple[int, ...]  # of the coordinate, in the order they run


class Pass(NamedTuple):
    """One pass of a stage; those of a kind take its micro-batches in order.

    "reduce" follows the last one. A rank with several stages gathers and frees the weights of a whole stage as well.
    """

    kind: Kind
    stage: int


def passes(layout: Layout, coordinate: int, count: int) -> tuple[Pass, ...]:
    """Return the passes at a pipeline coordinate in a step of `count` micro-batches."""
    return _passes(layout.schedule, layout.pipeline, tuple(layout.stages_of_rank(coordinate)), coordinate, count)


@lru_cache(maxsize=1024)  # a search asks for the same ones again and again
def _passes(schedule: str, pipeline: int, stages: tuple[int, ...], coordinate: int, count: int) -> tuple[Pass, ...]:
    order = list(ORDERS[schedule](pipeline, stages, coordinate, count))
    active: list[Stages] = _active(order) if len(stages) > 1 else [()] * len(order)
    ends, found = Counter[int](), list[Pass]()
    gathered: Stages = ()
    for one, wanted in zip(order, active, strict=True):
        found += [Pass("free", stage) for stage in gathered if stage not in wanted]
        found += [Pass("gather", stage) for stage in wanted if stage not in gathered]
        found.append(one)
        gathered = wanted
        if one.kind in ("backward", "backward_weights"):
            ends[one.stage] += 1
            if ends[one.stage] == count:
                found.append(Pass("reduce", one.stage))
    return tuple(found)


def gathers_of_stage(layout: Layout, count: int) -> float:
    """Return how often weights that stay gathered are gathered in a step, on average over the first rank's stages.

    A rank keeps those of ACTIVE_STAGES stages at once. Steps of many micro-batches are extended from shorter ones.
    """
    stages = layout.stage_count // layout.pipeline
    if stages <= ACTIVE_STAGES:
        return 1.0
    layout = Layout(pipeline=layout.pipeline, schedule=layout.schedule, stages_per_rank=layout.stages_per_rank)
    few, more = 4 * layout.pipeline, 5 * layout.pipeline
    if count <= more:
        return _gathers(layout, count)
    one, other = _gathers(layout, few), _gathers(layout, more)
    return one + (other - one) * (count - few) / (more - few)


@lru_cache(maxsize=4096)
def _gathers(layout: Layout, count: int) -> float:
    found = sum(one.kind == "gather" for one in passes(layout, 0, count))
    return found * layout.pipeline / layout.stage_count


def _active(order: list[Pass]) -> list[Stages]:
    """For each pass, the stages whose weights are gathered: those of this pass and the next ones."""
    found, next_ones = list[Stages](), list[int]()
    for one in reversed(order):
        next_ones = [one.stage, *(stage for stage in next_ones if stage != one.stage)]
        found.append(tuple(next_ones[:ACTIVE_STAGES]))
    return found[::-1]


def _gpipe(p: int, stages: Stages, coordinate: int, count: int) -> Iterator[Pass]:
    yield from [Pass("forward", coordinate)] * count
    yield from [Pass("backward", coordinate)] * count


def _one_forward_one_backward(p: int, stages: Stages, coordinate: int, count: int) -> Iterator[Pass]:
    ahead = min(count, p - coordinate)
    forward, backward = Pass("forward", coordinate), Pass("backward", coordinate)
    yield from [forward] * ahead
    yield from [backward, forward] * (count - ahead)
    yield from [backward] * ahead


def _interleaved(p: int, stages: Stages, coordinate: int, count: int) -> Iterator[Pass]:
    """Rounds of as many micro-batches as ranks, through one stage after the other."""
    at_once = count // max(1, count // p)
    whole = len(stages) * count
    ahead = min((len(stages) - 1) * at_once + 2 * (p - 1 - coordinate), whole)
    forwards = [Pass("forward", stages[step // at_once % len(stages)]) for step in range(whole)]
    backwards = [Pass("backward", stages[-1 - step // at_once % len(stages)]) for step in range(whole)]
    yield from forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        yield from (forward, backward)
    yield from backwards[whole - ahead :]


def _zero_bubble(p: int, stages: Stages, coordinate: int, count: int) -> Iterator[Pass]:
    """Of at least 2p - 1 micro-batches; those that a step does not have are left out."""
    down, up = stages
    done = Counter[Pass]()

    def run(kind: Kind, stage: int) -> Iterator[Pass]:
        one = Pass(kind, stage)
        done[one] += 1
        if done[one] <= count:
            yield one

    def both(stage: int) -> Iterator[Pass]:
        yield from run("backward_inputs", stage)
        yield from run("backward_weights", stage)

    most, ahead, seen = max(2 * p - 1, count), 2 * (p - coordinate) - 1 + coordinate, coordinate + p - coordinate
    for _ in range(2 * (p - coordinate) - 1):
        yield from run("forward", down)
    for _ in range(coordinate):
        yield from run("forward", up)
        yield from run("forward", down)
    for _ in range(p - coordinate):
        yield from run("forward", up)
        yield from both(up)
    while seen < ahead or ahead < most:
        if ahead < most:
            yield from run("forward", down)
            ahead += 1
        yield from both(down)
        yield from run("forward", up)
        yield from both(up)
        seen += 1
    for _ in range(coordinate):
        yield from run("backward_inputs", down)
        yield from run("backward_inputs", up)
    for _ in range(p - coordinate):
        yield from both(down)
    for _ in range(coordinate):
        yield from run("backward_weights", up)
    for _ in range(coordinate):
        yield from run("backward_weights", down)


def _dual_pipe_v(p: int, stages: Stages, coordinate: int, count: int) -> Iterator[Pass]:
    """Weights' gradients wait in a queue while the pipeline fills and drains."""
    down, up = stages
    waiting = deque[int]()

    def inputs(stage: int) -> Pass:
        waiting.append(stage)
        return Pass("backward_inputs", stage)

    def weights() -> list[Pass]:
        return [Pass("backward_weights", waiting.popleft())] if waiting else []

    yield from [Pass("forward", down)] * (2 * (p - 1 - coordinate))
    yield from [Pass("forward", down), Pass("forward", up)] * (coordinate + 1)
    for _ in range(p - 1 - coordinate):
        yield inputs(up)
        yield from weights()
        yield Pass("forward", up)
    steady = [Pass("forward", down), Pass("backward", up), Pass("forward", up), Pass("backward", down)]
    yield from steady * (count - 2 * p + coordinate + 1)
    yield from steady[1:] * (p - 1 - coordinate)
    split = False
    for step in range(coordinate + 1):
        half = step == (coordinate + 1) // 2
        split |= half and coordinate % 2 == 1
        yield inputs(up) if split else Pass("backward", up)
        split |= half and coordinate % 2 == 0
        yield inputs(down) if split else Pass("backward", down)
    for _ in range(p - 1 - coordinate):
        yield from weights()
        yield inputs(down) if split else Pass("backward", down)
    for _ in range(coordinate + 1):
        yield from weights()


ORDERS: dict[str, Callable[[int, Stages, int, int], Iterator[Pass]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zbv": _zero_bubble,
    "dualpipev": _dual_pipe_v,
}
