"""The curves of a run: one column a quantity, thinned for the page, over tokens, steps and running time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minka.plan.ledger import number
from minka.report.downsample import Numbers, downsample, evenly, rounded, smooth
from minka.report.run_files import Event, RunFiles

PARTS = ("data", "compute", "save", "eval")  # of a step's seconds
CURVES = ("loss", "grad_norm", "learning_rate", "batch_tokens", "tokens_per_second", "mfu", "data", "compute")
SPIKES = ("save", "eval")  # in most steps only the check whether one is due; such steps are left out
CHECK_SECONDS = 1e-4
SMOOTHED = ("loss", "grad_norm")
MAX_MARKS = 400  # of one kind, of one run
Columns = dict[str, Numbers]


def step_columns(run: RunFiles) -> Columns:
    """Return the steps of `run` that count, as columns. `seconds` is running time; NaN stands for a missing number."""
    steps = [event for event in run.kept if event["event"] == "step"]
    names = ("step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")
    columns = {name: _column(steps, name) for name in names}
    columns |= {part: _part_seconds(steps, part) for part in PARTS}
    columns["batch_tokens"] = _batch_tokens(columns["step"], columns["tokens"], run.starts)
    # Steps are written some at a time, with the time of writing. A step ended no later than it was written, and no
    # later than the next one began.
    took = np.cumsum(np.nansum([columns[part] for part in PARTS], axis=0))
    slack = _column(steps, "running_seconds") - took
    columns["seconds"] = np.maximum(took + np.minimum.accumulate(slack[::-1])[::-1], 0.0)
    return columns


def curves(steps: Columns, points: int) -> dict[str, dict[str, Any]]:
    """Return every curve that the page draws, as {"step", "tokens", "seconds", "value"}."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*CURVES, *SPIKES):
        values = steps[name]
        rows = np.flatnonzero(values > CHECK_SECONDS) if name in SPIKES else np.arange(len(values))
        if np.isfinite(values[rows]).any():
            found[name] = _curve(steps, values, rows[downsample(values[rows], points)])
    for name in SMOOTHED:
        values = smooth(steps[name])
        if np.isfinite(values).any():
            found[f"{name}_smooth"] = _curve(steps, values, evenly(len(values), points // 2))
    bad = np.flatnonzero(~np.isfinite(steps["loss"]))
    if len(bad):
        found["not_finite"] = _curve(steps, steps["loss"], bad[evenly(len(bad), MAX_MARKS)])
    return found


def time_split(run: RunFiles, steps: Columns) -> dict[str, float]:
    """Return running seconds by part. `repeated`: steps that count no more; `starting, waiting`: the rest."""
    all_steps, stops = ([event for event in run.events if event["event"] == kind] for kind in ("step", "stop"))
    split: dict[str, Any] = {}
    repeated = 0.0
    for part in PARTS:
        counted = np.nansum(steps[part])
        split[part] = counted + np.nansum(_part_seconds(stops, part))
        repeated += float(np.nansum(_part_seconds(all_steps, part)) - counted)
    if len(all_steps) > len(steps["step"]):
        split["repeated"] = repeated
    total = run.events[-1]["running_seconds"] if run.events else 0.0
    split["starting, waiting"] = total - sum(split.values())
    return {name: round(max(0.0, float(seconds)), 3) for name, seconds in split.items()}


def _part_seconds(steps: Sequence[Event], part: str) -> Numbers:
    """Return one part of the seconds of each step; 0 where there is none."""
    found = (event.get("seconds") for event in steps)
    return np.array([number(seconds.get(part)) if isinstance(seconds, dict) else 0.0 for seconds in found])


def _curve(steps: Columns, values: Numbers, kept: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "step": rounded(steps["step"][kept], 12),
        "tokens": rounded(steps["tokens"][kept], 15),
        "seconds": rounded(steps["seconds"][kept]),
        "value": rounded(values[kept]),
    }


def _column(steps: Sequence[Event], name: str) -> Numbers:
    return np.array([number(event.get(name)) for event in steps], dtype=np.float64)


def _batch_tokens(step: Numbers, tokens: Numbers, starts: Sequence[Event]) -> Numbers:
    """Return the tokens of each step's batch: the difference to the step before; over lost lines, the mean."""
    began = next((start for start in starts if len(step) and start["step"] < step[0]), {"step": 0, "tokens": 0})
    steps = np.diff(step, prepend=began["step"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(steps > 0, np.diff(tokens, prepend=began["tokens"]) / steps, np.nan)
