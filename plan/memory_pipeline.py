"""The peak of a pipeline coordinate: what each pass of its stages adds, takes away, and needs while it runs, in order.

Stages have a buffer for each micro-batch's hidden states, and one for their gradients. What a schedule of several
stages sends is kept until the end of the step.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.layout import Layout
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.memory_pass import Change, StagePasses, State
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_passes import Pass, passes


class _Changed(NamedTuple):
    """A pass from one state of its stage to the next, and the totals of its change."""

    change: Change
    moment: str
    top: int
    net: int
    state: State


def peak_of_coordinate(
    layout: Layout, coordinate: int, stages: Mapping[int, Stage], count: int
) -> tuple[str, dict[str, int]]:
    """Return the moment of the peak in a step of `count` micro-batches, and its bytes by kind."""
    runs = {index: StagePasses(layout, index, stage, count) for index, stage in stages.items()}
    several = len(stages) > 1
    states = dict.fromkeys(stages, State(gathered=several, rooted=several))
    by_kind = Counter[str](optimizer=4)
    for run in runs.values():
        by_kind.update(run.before())
    known: dict[tuple[Pass, State], _Changed] = {}
    total = best = sum(by_kind.values())
    found, best_at, order = list[_Changed](), -1, passes(layout, coordinate, count)
    for at, one in enumerate(order):
        key = one, states[one.stage]
        changed = known.get(key)
        if changed is None:
            changed = known[key] = _changed(*runs[one.stage].change(*key))
        if total + changed.top > best:
            best, best_at = total + changed.top, at
        total += changed.net
        states[one.stage] = changed.state
        found.append(changed)
    for changed in found[: max(best_at, 0)]:
        by_kind.update(changed.change.after)
    if best_at >= 0:
        by_kind.update(found[best_at].change.moments[found[best_at].moment])
    moment = f"{found[best_at].moment} of stage {order[best_at].stage}"
    return moment, {kind: by_kind[kind] for kind in MEMORY_KINDS}


def _changed(change: Change, state: State) -> _Changed:
    tops = {name: sum(moment.values()) for name, moment in change.moments.items()}
    moment = max(tops, key=lambda name: tops[name])
    return _Changed(change, moment, tops[moment], sum(change.after.values()), state)
