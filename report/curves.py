"""The curves of a run: one column a quantity, thinned for the page, over tokens, steps and running time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minka.plan.ledger import number
from minka.report.downsample import Numbers, downsample, evenly, rounded, smooth
from minka.report.run_files import Event, RunFiles
from minka.report.running_time import RunningTime

PARTS = ("data", "compute", "save", "eval")  # of a step's seconds
CURVES = ("loss", "grad_norm", "learning_rate", "batch_tokens", "tokens_per_second", "mfu", "data", "compute")
SPIKES = ("save", "eval")  # in most steps only the check whether one is due; such steps are left out
CHECK_SECONDS = 1e-4
SMOOTHED = ("loss", "grad_norm")
MAX_MARKS = 400  # of one kind, of one run


class StepColumns(NamedTuple):
    """The steps that count, one row each. `seconds` is running time; NaN stands for a missing number."""

    step: Numbers
    tokens: Numbers
    seconds: Numbers
    of: dict[str, Numbers]


def step_columns(run: RunFiles, time: RunningTime) -> StepColumns:
    """Return the steps of `run` that count, as columns."""
    steps = [event for event in run.kept if event["event"] == "step"]
    of = {name: _column(steps, name) for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")}
    of |= {part: part_seconds(steps, part) for part in PARTS}
    took = np.nansum([of[part] for part in PARTS], axis=0) if steps else np.empty(0)
    step, tokens = _column(steps, "step"), _column(steps, "tokens")
    of["batch_tokens"] = _batch_tokens(step, tokens, run.events)
    return StepColumns(step, tokens, time.of_steps(steps, took), of)


def curves(steps: StepColumns, points: int) -> dict[str, dict[str, Any]]:
    """Return every curve that the page draws, as {"step", "tokens", "seconds", "value"}."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*CURVES, *SPIKES):
        values = steps.of[name]
        rows = np.flatnonzero(values > CHECK_SECONDS) if name in SPIKES else np.arange(len(values))
        if np.isfinite(values[rows]).any():
            found[name] = _curve(steps, values, rows[downsample(values[rows], points)])
    for name in SMOOTHED:
        values = smooth(steps.of[name])
        if np.isfinite(values).any():
            found[f"{name}_smooth"] = _curve(steps, values, evenly(len(values), points // 2))
    bad = np.flatnonzero(~np.isfinite(steps.of["loss"]))
    if len(bad):
        found["not_finite"] = _curve(steps, steps.of["loss"], bad[evenly(len(bad), MAX_MARKS)])
    return found


def part_seconds(steps: Sequence[Event], part: str) -> Numbers:
    """Return one part of the seconds of each step; 0 where there is none."""
    found = (event.get("seconds") for event in steps)
    return np.array([number(seconds.get(part)) if isinstance(seconds, dict) else 0.0 for seconds in found])


def _curve(steps: StepColumns, values: Numbers, kept: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "step": rounded(steps.step[kept], 12),
        "tokens": rounded(steps.tokens[kept], 15),
        "seconds": rounded(steps.seconds[kept]),
        "value": rounded(values[kept]),
    }


def _column(steps: Sequence[Event], name: str) -> Numbers:
    return np.array([number(event.get(name)) for event in steps], dtype=np.float64)


def _batch_tokens(step: Numbers, tokens: Numbers, events: Sequence[Event]) -> Numbers:
    """Return the tokens of each step's batch: the difference to the step before; over lost lines, the mean."""
    if not len(step):
        return np.empty(0)
    began = next((e for e in events if e["event"] == "start" and e["step"] < step[0]), {"step": 0, "tokens": 0})
    steps = np.diff(step, prepend=began["step"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(steps > 0, np.diff(tokens, prepend=began["tokens"]) / steps, np.nan)
