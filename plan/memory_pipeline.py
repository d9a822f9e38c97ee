"""The peak of a pipeline coordinate: what each pass of its stages adds, needs while it runs, and takes away, in order.

Each stage has a buffer for every micro-batch's hidden states, and one for their gradients. What a schedule of several
stages sends is kept until the end of the step.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.layout import Layout, micro_batches_fit
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.memory_pass import Change, StagePasses, StageState, add
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_passes import Pass, passes


class _Run(NamedTuple):
    """A pass that has been run: its change, the largest moment within it, the total of both, and the state after it."""

    change: Change
    moment: str
    top: int
    net: int
    state: StageState


def peak_of_coordinate(
    layout: Layout, coordinate: int, stages: Mapping[int, Stage], count: int
) -> tuple[str, dict[str, int]]:
    """Return the moment of the peak in a step of `count` micro-batches, and its bytes by kind.

    From some number on each further micro-batch adds the same; in rounds, each further round.
    """
    fewer = 2 * layout.stage_count
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
    states = dict.fromkeys(stages, StageState())
    by_kind = add({"optimizer": 4}, *(stage.before() for stage in of_stage.values()))
    total, best, best_at = sum(by_kind.values()), 0, 0
    order, runs, known = passes(layout, coordinate, count), list[_Run](), dict[tuple[Pass, StageState], int]()
    ran: list[int] = []  # indices into runs
    for at, one in enumerate(order):
        key = one, states[one.stage]
        index = known.setdefault(key, len(runs))
        if index == len(runs):
            runs.append(_run(*of_stage[one.stage].change(*key)))
        run = runs[index]
        if total + run.top > best:
            best, best_at = total + run.top, at
        total += run.net
        states[one.stage] = run.state
        ran.append(index)
    for index, times in Counter(ran[:best_at]).items():
        by_kind = add(by_kind, {kind: size * times for kind, size in runs[index].change.after.items()})
    run = runs[ran[best_at]]
    by_kind = add(by_kind, run.change.moments[run.moment])
    return f"{run.moment} of stage {order[best_at].stage}", {kind: by_kind.get(kind, 0) for kind in MEMORY_KINDS}


def _run(change: Change, state: StageState) -> _Run:
    tops = {moment: sum(by_kind.values()) for moment, by_kind in change.moments.items()}
    moment = max(tops, key=lambda moment: tops[moment])
    return _Run(change, moment, tops[moment], sum(change.after.values()), state)
