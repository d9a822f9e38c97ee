"""Fits a machine's rates to measured steps: few numbers, each held near its tabulated value by what it may be off.

The fit is the most probable one: relative errors of the steps and logarithms of the rates are taken as normal, so a
rate that no measured step depends on keeps its tabulated value. Ten steps are enough (docs/numbers.md has the errors).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any, NamedTuple

from minka.plan.errors import UserError
from minka.plan.machine import Machine
from minka.plan.rates import FITTED
from minka.plan.step_time import step_time
from minka.plan.step_work import Job

STEP_ERROR = 0.03  # of a measured step against the model: what published tables leave
# Standard deviation of a rate's logarithm around its tabulated value. Launches and latencies vary more than shares.
SPREAD = dict.fromkeys(FITTED, 0.3) | {"layer_seconds": 0.7, "message_seconds": 0.7, "exposed": 1.0, "attention": 0.2}
SHARE_LIMIT = {"matrix": 1.0, "memory": 1.0, "link": 1.0, "network": 1.0, "exposed": 1.0}
ROUNDS = 30


class Measured(NamedTuple):
    """A step that was timed."""

    job: Job
    seconds: float


def calibrate(machine: Machine, steps: Sequence[Measured], source: str) -> Machine:
    """Return the machine with the rates that explain the steps best. Raises UserError without any."""
    import numpy as np

    if not steps:
        raise UserError("no measured step", where="minka plan calibrate", remedy="give folders of runs that trained")
    start = [max(getattr(machine.rates, key), 1e-9) for key in FITTED]
    spreads = np.array([SPREAD[key] for key in FITTED])

    def residuals(moves: "np.ndarray") -> "np.ndarray":
        there = _moved(machine, start, moves)
        steps_off = [(step_time(one.job, there).seconds / one.seconds - 1) / STEP_ERROR for one in steps]
        return np.array([*steps_off, *(moves / spreads)])

    moves = np.zeros(len(FITTED))
    now = residuals(moves)
    damping = 1e-3
    for _ in range(ROUNDS):  # Levenberg-Marquardt: each rate's slope by a small step
        slopes = np.array([(residuals(moves + 1e-4 * unit) - now) / 1e-4 for unit in np.eye(len(FITTED))]).T
        square = slopes.T @ slopes
        tried = moves - np.linalg.solve(square + damping * np.diag(np.diag(square)), slopes.T @ now)
        then = residuals(tried)
        if then @ then < now @ now:
            done = now @ now - then @ then < 1e-6 * (now @ now)
            moves, now, damping = tried, then, damping / 5
            if done:
                break
        else:
            damping *= 5
            if damping > 1e6:
                break
    found = _moved(machine, start, moves)
    return replace(found, rates=replace(found.rates, calibrated_on=source))


def _moved(machine: Machine, start: Sequence[float], moves: Iterable[float]) -> Machine:
    """Return the machine whose rates are `moves` away, as logarithms, within their limits."""
    values: dict[str, Any] = {}
    for key, value, move in zip(FITTED, start, moves, strict=True):
        values[key] = min(exp(log(value) + float(move)), SHARE_LIMIT.get(key, float("inf")))
    return replace(machine, rates=replace(machine.rates, **values))


def errors(machine: Machine, steps: Sequence[Measured]) -> list[float]:
    """Return how much longer than measured each step is predicted, as a share."""
    return [step_time(one.job, machine).seconds / one.seconds - 1 for one in steps]
