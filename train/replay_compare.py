"""Pure functions: the steps that a ledger records, the checkpoint to replay one from, and how the two compare."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minka.plan.errors import UserError
from minka.plan.ledger import RETURNS, number

COMPARED = ("loss", "grad_norm", "learning_rate", "target_count")
FROM_WEIGHTS = ("loss", "grad_norm")  # the compared numbers that depend on the weights
# Relative. fp32: what two layouts of one run may differ by (tests/train/test_layouts.py). bf16: two ranks and one rank
# differed by 3e-6 and 7e-4 after three steps of a tiny model; larger models and longer replays get more room.
BOUNDS = {
    "float32": {"loss": 2e-6, "grad_norm": 2e-5, "learning_rate": 1e-9, "target_count": 0.0},
    "bfloat16": {"loss": 1e-3, "grad_norm": 2e-2, "learning_rate": 1e-9, "target_count": 0.0},
}
GROWTH = 10.0  # the most by which rounding differences grow from one step to the next
VERDICTS = ("bit for bit", "equal to rounding", "rounding that grew", "differs")


class RecordedStep(NamedTuple):
    """A `step` event, and the `start` event before it, which holds the settings that the step was taken with."""

    event: Mapping[str, Any]
    start: Mapping[str, Any]


@dataclass
class RecordedRun:
    """The steps and saves of a run's current lineage. `void` maps each discarded step to the step returned to."""

    steps: dict[int, RecordedStep] = field(default_factory=dict)
    void: dict[int, int] = field(default_factory=dict)
    saves: set[int] = field(default_factory=set)


def recorded_run(events: Iterable[Mapping[str, Any]]) -> RecordedRun:
    """Read a ledger's events in order."""
    run = RecordedRun()
    start: Mapping[str, Any] = {}
    for event in events:
        kind, step = event["event"], event["step"]
        if kind in RETURNS:
            run.void |= {at: step for at in run.steps if at > step}
            run.steps = {at: recorded for at, recorded in run.steps.items() if at <= step}
            run.saves = {at for at in run.saves if at <= step} | ({step} if kind == "restore" else set())
        elif kind == "start":
            start = event
        elif kind == "save":
            run.saves.add(step)
        elif kind == "step":
            run.steps[step] = RecordedStep(event, start)
            run.void.pop(step, None)
    return run


def checkpoint_before(run: RecordedRun, step: int, on_disk: Collection[int], where: str) -> int | None:
    """Return the step of the checkpoint to replay `step` from; None: the start of the run. Raises UserError.

    `on_disk` holds the steps of the existing checkpoints.
    """
    if step not in run.steps:
        what = f"the ledger has no step {step}"
        if step in run.void:
            what = f"step {step} was discarded: the run returned to step {run.void[step]} and has not reached it again"
        recorded = f"recorded steps: {min(run.steps)} to {max(run.steps)}" if run.steps else "no step is recorded yet"
        raise UserError(what, where=where, remedy=recorded)
    usable = sorted(run.saves & set(on_disk))
    before = [at for at in usable if at < step]
    if before:
        return before[-1]
    first_save = min(run.saves, default=step)
    if step <= first_save:
        return None
    ranges = [(min(run.steps), first_save), *((at + 1, max(run.steps)) for at in usable[:1])]
    replayable = " and ".join(f"{first} to {last}" for first, last in ranges if first <= last)
    raise UserError(
        f"no checkpoint before step {step} is left",
        where=where,
        why="the run keeps the checkpoints named by checkpoint.keep, keep_every_steps and keep_tokens",
        remedy=f"steps that can be replayed: {replayable}" if replayable else "no step can be replayed",
    )


def difference(one: float, other: float) -> float:
    """Relative to the larger number; 0 for equal numbers and two NaNs, infinite when only one of them is finite."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def differences(event: Mapping[str, Any], replayed: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Compare a `step` event with the numbers of the replayed step."""
    return {
        name: {
            "recorded": event[name],
            "replayed": replayed[name],
            "difference": difference(number(event[name]), float(replayed[name])),
        }
        for name in COMPARED
        if type(event.get(name)) in (int, float)
    }


def check_comparable(event: Mapping[str, Any], where: str) -> None:
    """Raise UserError when a `step` event lacks the numbers that identify the step."""
    lost = [name for name in FROM_WEIGHTS if type(event.get(name)) not in (int, float)]
    if lost:
        what = f"the ledger's line of step {event['step']} lacks {' and '.join(lost)}"
        raise UserError(what, where=where, why="the line is damaged", remedy="replay a different step")


def verdicts(steps: Mapping[int, Mapping[str, Mapping[str, float]]], dtype: str) -> dict[int, str]:
    """Judge the differences of each step, computed in `dtype`. The steps must be in order.

    Training carries a rounding difference from step to step and makes it grow slowly. A fault, different data or
    different weights are a jump. So a step beyond the bounds still counts as rounding when its difference is at most
    GROWTH times the largest of the steps before it.
    """
    bounds = BOUNDS.get(dtype, BOUNDS["float32"])
    largest = dict.fromkeys(FROM_WEIGHTS, 0.0)
    judged = {}
    for step, compared in steps.items():
        found = {name: numbers["difference"] for name, numbers in compared.items()}
        if all(d == 0 for d in found.values()):
            judged[step] = "bit for bit"
        elif all(d <= bounds[name] for name, d in found.items()):
            judged[step] = "equal to rounding"
        elif all(d <= max(bounds[name], GROWTH * largest.get(name, 0.0)) for name, d in found.items()):
            judged[step] = "rounding that grew"
        else:
            judged[step] = "differs"
            continue
        largest = {name: max(largest[name], found.get(name, 0.0)) for name in FROM_WEIGHTS}
    return judged
