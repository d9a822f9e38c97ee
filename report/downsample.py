"""Long curves thinned to what a screen can show. No spike and no gap is lost."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
MIN_TO_SMOOTH = 100
TINY = 1e-9  # a weight that is only rounding


def downsample(values: Numbers, points: int) -> npt.NDArray[np.int64]:
    """Return the indices of `values` to keep, in order: all of at most `points`, else about `points`.

    Kept are the minimum, the maximum and one non-finite value of each bucket of neighbours, and the first and the last
    of all.
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


def evenly(count: int, points: int) -> npt.NDArray[np.int64]:
    """Return at most `points` of `count` indices, evenly spaced, with the first and the last."""
    if count <= points:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, points).round().astype(np.int64))


def smooth(values: Numbers) -> Numbers:
    """Return the mean over neighbours on both sides, with weights that halve every two hundredth of the series.

    Both sides, so that it does not lag. Non-finite values do not count. Empty for a series too short to need it.
    """
    if len(values) < MIN_TO_SMOOTH:
        return np.empty(0)
    finite = np.isfinite(values)
    known, weights = np.where(finite, values, 0.0), finite.astype(np.float64)
    decay = 0.5 ** (200 / len(values))
    total = _decayed_sums(known, decay) + _decayed_sums(known[::-1], decay)[::-1] - known
    weight = _decayed_sums(weights, decay) + _decayed_sums(weights[::-1], decay)[::-1] - weights
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > TINY, total / weight, np.nan)


def _decayed_sums(values: Numbers, decay: float) -> Numbers:
    sums, total = [], 0.0
    for value in values.tolist():
        total = decay * total + value
        sums.append(total)
    return np.array(sums)


def rounded(values: Sequence[float] | Numbers, digits: int = 6) -> list[float | int | None]:
    """Return numbers for JSON with `digits` significant digits; None for non-finite ones."""
    out: list[float | int | None] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        short = float(f"{value:.{digits}g}")
        out.append(None if not math.isfinite(value) else int(short) if short.is_integer() else short)
    return out
