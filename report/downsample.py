"""Long series cut down to what a screen can show, without losing a spike or a gap."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
FEWEST_TO_SMOOTH = 100
TINY = 1e-9  # a weight that is rounding


def thin(values: Numbers, points: int) -> npt.NDArray[np.int64]:
    """Which of `values` to keep: all, if there are no more than `points`; else about so many, in order.

    Of each bucket of neighbours the least and the greatest stay, and one that is not finite where there is one; of the
    whole the first and the last.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, max(1, points // 2) + 1).astype(np.int64)
    keep = {0, count - 1}
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[first:end]
        finite = np.isfinite(part)
        if not finite.all():
            keep.add(first + int(np.argmin(finite)))
        if finite.any():
            keep.add(first + int(np.argmin(np.where(finite, part, np.inf))))
            keep.add(first + int(np.argmax(np.where(finite, part, -np.inf))))
    return np.array(sorted(keep), dtype=np.int64)


def spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` of `count` places, evenly spread, the first and the last among them."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def smooth(values: Numbers) -> Numbers:
    """A mean over the neighbours on both sides, of weights that halve every two hundredth of the series.

    Both sides, so that it does not lag behind; at the end there is the past only. What is not finite does not count.
    Empty for a series too short to need it.
    """
    if len(values) < FEWEST_TO_SMOOTH:
        return np.empty(0)
    there = np.isfinite(values)
    known, weights = np.where(there, values, 0.0), there.astype(np.float64)
    fade = 0.5 ** (200 / len(values))
    total = _faded(known, fade) + _faded(known[::-1], fade)[::-1] - known
    weight = _faded(weights, fade) + _faded(weights[::-1], fade)[::-1] - weights
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > TINY, total / weight, np.nan)


def _faded(values: Numbers, fade: float) -> Numbers:
    """Running sums in which each step back counts `fade` times as much."""
    out, total = [], 0.0
    for value in values.tolist():
        total = fade * total + value
        out.append(total)
    return np.array(out)


def plain(values: Sequence[float] | Numbers, digits: int = 6) -> list[float | int | None]:
    """Numbers for JSON, to `digits` significant digits; None for what is not finite."""
    out: list[float | int | None] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        short = float(f"{value:.{digits}g}")
        out.append(None if not math.isfinite(value) else int(short) if short.is_integer() else short)
    return out
