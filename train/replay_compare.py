"""What a ledger says of single steps: which count, under which settings each was taken, and what one can begin from.

Also when two recordings of a step are the same. Pure: events and numbers in, answers out.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minka.plan.errors import UserError
from minka.plan.ledger import RETURNS, number

COMPARED = ("loss", "grad_norm", "learning_rate", "target_count")
WEIGHED = ("loss", "grad_norm")  # of these, what the weights decide
# Relative. fp32: what two layouts of one run may differ by (tests/train/test_layouts.py). bf16: two ranks against one
# were 3e-6 and 7e-4 apart after three steps of a tiny model; larger models and longer ways get room.
BOUNDS = {
    "float32": {"loss": 2e-6, "grad_norm": 2e-5, "learning_rate": 1e-9, "target_count": 0.0},
    "bfloat16": {"loss": 1e-3, "grad_norm": 2e-2, "learning_rate": 1e-9, "target_count": 0.0},
}
GROWTH = 10.0  # from one step to the next, at most, of what two runs are apart when nothing but rounding is
Verdict = Literal["bit for bit", "equal to rounding", "rounding that grew", "differs"]
VERDICTS: tuple[Verdict, ...] = ("bit for bit", "equal to rounding", "rounding that grew", "differs")


class Line(NamedTuple):
    """A step's event, and the `start` event before it, which has the settings in force."""

    event: Mapping[str, Any]
    start: Mapping[str, Any]


@dataclass
class Recorded:
    """The steps that count, those that do not (and to which step the run returned), and where checkpoints were made."""

    steps: dict[int, Line] = field(default_factory=dict)
    void: dict[int, int] = field(default_factory=dict)
    saves: set[int] = field(default_factory=set)


def recorded(events: Iterable[Mapping[str, Any]]) -> Recorded:
    """Go through a ledger's events in order."""
    found = Recorded()
    start: Mapping[str, Any] = {}
    for event in events:
        kind, step = event["event"], event["step"]
        if kind in RETURNS:
            gone = {at for at in found.steps if at > step}
            found.void |= dict.fromkeys(gone, step)
            found.steps = {at: line for at, line in found.steps.items() if at not in gone}
            found.saves = {at for at in found.saves if at <= step} | ({step} if kind == "restore" else set())
        elif kind == "start":
            start = event
        elif kind == "save":
            found.saves.add(step)
        elif kind == "step":
            found.steps[step] = Line(event, start)
            found.void.pop(step, None)
    return found


def checkpoint_before(found: Recorded, step: int, there: Collection[int], where: str) -> int | None:
    """The step of the checkpoint from which `step` can be run again; None: from where the run began.

    `there`: steps of the checkpoints on disk. Raises UserError when `step` does not count or nothing leads to it.
    """
    if step not in found.steps:
        raise _not_recorded(found, step, where)
    usable = sorted(found.saves & set(there))
    before = [at for at in usable if at < step]
    if before:
        return before[-1]
    first = min(found.saves, default=step)
    if step <= first:
        return None
    ranges = [f"{min(found.steps)} to {first}"] if min(found.steps) <= first else []
    ranges += [f"{usable[0] + 1} to {max(found.steps)}"] if usable and usable[0] < max(found.steps) else []
    raise UserError(
        f"there is no checkpoint before step {step}",
        where=where,
        why="the run keeps its newest ones only (checkpoint.keep), and those of checkpoint.keep_every_steps and "
        "checkpoint.keep_tokens",
        remedy=f"steps that can be run again: {' and '.join(ranges)}" if ranges else "no step can be run again",
    )


def difference(one: float, other: float) -> float:
    """Relative to the larger; 0 for equal numbers, not-a-numbers too; infinite when only one of them is finite."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def differences(line: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of one step: what was recorded, what was found when it was run again, and how far they are apart."""
    return {
        name: {
            "recorded": line[name],
            "replayed": again[name],
            "difference": difference(number(line[name]), float(again[name])),
        }
        for name in COMPARED
        if _is_number(line.get(name))
    }


def check_comparable(line: Mapping[str, Any], where: str) -> None:
    """Raises UserError when the ledger has too little of a step to say whether another is the same."""
    lost = [name for name in WEIGHED if not _is_number(line.get(name))]
    if lost:
        raise UserError(
            f"the ledger's line of step {line['step']} has no {' and no '.join(lost)} to compare with",
            where=where,
            why="a step that was run again could be any other, and would be called the same",
            remedy="the line has been mangled; take another step",
        )


def verdicts(steps: Mapping[int, Mapping[str, Mapping[str, float]]], dtype: str) -> dict[int, Verdict]:
    """What the differences of each step come to, computed in `dtype`; steps in their order.

    Training carries a difference on and makes it grow, by little from step to step; a fault, other data or another
    weight is a jump. So beyond the bounds a step is still the same when it is GROWTH times as far apart as any step
    before it on the way, at most.
    """
    bounds = BOUNDS.get(dtype, BOUNDS["float32"])
    reached = dict.fromkeys(WEIGHED, 0.0)
    found: dict[int, Verdict] = {}
    for step, compared in steps.items():
        apart = {name: numbers["difference"] for name, numbers in compared.items()}
        if all(difference == 0 for difference in apart.values()):
            found[step] = "bit for bit"
        elif all(difference <= bounds[name] for name, difference in apart.items()):
            found[step] = "equal to rounding"
        elif all(d <= max(bounds[name], GROWTH * reached.get(name, 0.0)) for name, d in apart.items()):
            found[step] = "rounding that grew"
        else:
            found[step] = "differs"
        if found[step] != "differs":
            reached = {name: max(reached[name], apart.get(name, 0.0)) for name in WEIGHED}
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _not_recorded(found: Recorded, step: int, where: str) -> UserError:
    if step in found.void:
        return UserError(
            f"step {step} is void: the run returned to step {found.void[step]} after it, and has not come to it again",
            where=where,
            why="its numbers are of a lineage that ended",
            remedy=_counted(found),
        )
    return UserError(f"the ledger has no step {step}", where=where, remedy=_counted(found))


def _counted(found: Recorded) -> str:
    return f"steps that count: {min(found.steps)} to {max(found.steps)}" if found.steps else "no step counts yet"
