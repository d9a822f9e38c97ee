"""The peak of a pipeline coordinate: what each pass of its stages adds, needs while it runs, and takes away, in order.

Each stage has a buffer for every micro-batch's hidden states, and one for their gradients. What a schedule of several
stages sends is kept until the end of the step.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.layout import Layout, micro_batches_fit
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.memory_pass import Change, StagePasses, State
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_passes import Pass, passes


class _Run(NamedTuple):
    """A pass that has been run: its change, the largest moment within it, the total of both, and the state after it."""

    change: Change
    moment: str
    top: int
    net: int
    state: State


def peak_of_coordinate(
    layout: Layout, coordinate: int, stages: Mapping[int, Stage], count: int
) -> tuple[str, dict[str, int]]:
    """Return the moment of the peak in a step of `count` micro-batches, and its bytes by kind.

    From some number on each further micro-batch adds the same; in rounds, each further round.
    """
    fewer = 4 * layout.stage_count
    more = fewer + (layout.pipeline if layout.schedule == "interleaved" else 1)
    fits = micro_batches_fit(layout, fewer) and micro_batches_fit(layout, more)
    if count > 2 * more and fits and (count - more) % (more - fewer) == 0:
        moment, of_fewer = _simulated(layout, coordinate, stages, fewer)
        same, of_more = _simulated(layout, coordinate, stages, more)
        if moment == same:
            times = (count - more) // (more - fewer)
            return moment, {kind: size + times * (size - of_fewer[kind]) for kind, size in of_more.items()}
    return _simulated(layout, coordinate, stages, count)


def _simulated(layout: Layout, coordinate: int, stages: Mapping[int, Stage], count: int) -> tuple[str, dict[str, int]]:
    of_stage = {index: StagePasses(layout, index, stage, count) for index, stage in stages.items()}
    several = len(stages) > 1  # their weights are gathered before the first pass
    states = dict.fromkeys(stages, State(gathered=several, rooted=several))
    by_kind = Counter[str](optimizer=4)
    for stage in of_stage.values():
        by_kind.update(stage.before())
    total, best, best_at = sum(by_kind.values()), 0, 0
    known, order, runs = dict[tuple[Pass, State], _Run](), passes(layout, coordinate, count), list[_Run]()
    for at, one in enumerate(order):
        key = one, states[one.stage]
        run = known.get(key)
        if run is None:
            run = known[key] = _run(*of_stage[one.stage].change(*key))
        if total + run.top > best:
            best, best_at = total + run.top, at
        total += run.net
        states[one.stage] = run.state
        runs.append(run)
    for run in runs[:best_at]:
        by_kind.update(run.change.after)
    by_kind.update(runs[best_at].change.moments[runs[best_at].moment])
    return f"{runs[best_at].moment} of stage {order[best_at].stage}", {kind: by_kind[kind] for kind in MEMORY_KINDS}


def _run(change: Change, state: State) -> _Run:
    tops = {moment: sum(by_kind.values()) for moment, by_kind in change.moments.items()}
    moment = max(tops, key=lambda moment: tops[moment])
    return _Run(change, moment, tops[moment], sum(change.after.values()), state)
