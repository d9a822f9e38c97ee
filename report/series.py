"""The curves of a run: one column a quantity, thinned for the page, over tokens, steps and running time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minka.plan.ledger import number
from minka.report.downsample import Numbers, plain, smooth, spread, thin
from minka.report.load_run import Run
from minka.report.running_time import Clock

PARTS = ("data", "compute", "save", "eval")  # of a step's seconds
CURVES = ("loss", "grad_norm", "learning_rate", "batch_tokens", "tokens_per_second", "mfu", "data", "compute")
SPIKES = ("save", "eval")  # in most steps nothing but the question whether one is due: only the others are shown
ASKING_SECONDS = 1e-4
SMOOTHED = ("loss", "grad_norm")
MOST_MARKS = 400  # of one kind, of one run


class Columns(NamedTuple):
    """The steps that count, one row each; `seconds` is running time, NaN stands for a number that is not there."""

    step: Numbers
    tokens: Numbers
    seconds: Numbers
    of: dict[str, Numbers]


def columns(run: Run, clock: Clock) -> Columns:
    """The steps of `run` that count, as columns."""
    steps = [event for event in run.kept if event["event"] == "step"]
    of = {name: _numbers(steps, name) for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")}
    of |= {part: parts_of(steps, part) for part in PARTS}
    took = np.nansum([of[part] for part in PARTS], axis=0) if steps else np.empty(0)
    at = np.array([event["step"] for event in steps], dtype=np.float64)
    tokens = np.array([event["tokens"] for event in steps], dtype=np.float64)
    of["batch_tokens"] = _batches(at, tokens, run.events)
    return Columns(at, tokens, clock.of_steps(steps, took), of)


def curves(table: Columns, points: int) -> dict[str, dict[str, Any]]:
    """Every curve the page draws: {"step", "tokens", "seconds", "value", "of": how many there were}."""
    found: dict[str, dict[str, Any]] = {}
    for name in CURVES:
        values = table.of[name]
        if np.isfinite(values).any():
            found[name] = _curve(table, values, thin(values, points))
    for name in SPIKES:
        there = np.flatnonzero(table.of[name] > ASKING_SECONDS)
        if len(there):
            found[name] = _curve(table, table.of[name], there[thin(table.of[name][there], points)])
    for name in SMOOTHED:
        values = smooth(table.of[name])
        if np.isfinite(values).any():
            found[f"{name}_smooth"] = _curve(table, values, spread(len(values), points // 2))
    bad = np.flatnonzero(~np.isfinite(table.of["loss"]))
    if len(bad):
        found["not_finite"] = _curve(table, table.of["loss"], bad[spread(len(bad), MOST_MARKS)])
    return found


def _curve(table: Columns, values: Numbers, at: Any) -> dict[str, Any]:
    """`at` says which rows are kept of how many: all steps, for a curve, that can be kept."""
    return {
        "step": plain(table.step[at], 12),
        "tokens": plain(table.tokens[at], 15),
        "seconds": plain(table.seconds[at]),
        "value": plain(values[at]),
    }


def parts_of(steps: Sequence[dict[str, Any]], part: str) -> Numbers:
    """One part of the seconds of each step; 0 where it is not told."""
    inner = (event.get("seconds") for event in steps)
    return np.array([number(seconds.get(part)) if isinstance(seconds, dict) else 0.0 for seconds in inner])


def _numbers(steps: Sequence[dict[str, Any]], name: str) -> Numbers:
    return np.array([number(event.get(name)) for event in steps], dtype=np.float64)


def _batches(step: Numbers, tokens: Numbers, events: Sequence[dict[str, Any]]) -> Numbers:
    """Tokens of each step's batch, by the tokens counted before it; over a line that is lost, the mean."""
    if not len(step):
        return np.empty(0)
    began = next((e for e in events if e["event"] == "start" and e["step"] < step[0]), {"step": 0, "tokens": 0})
    steps = np.diff(step, prepend=began["step"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(steps > 0, np.diff(tokens, prepend=began["tokens"]) / steps, np.nan)
