"""Long curves thinned to what a screen can show. No spike and no gap is lost."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
MIN_TO_SMOOTH = 100
TINY = 1e-9  # a weight that is only rounding


def downsample(values: Numbers, points: int) -> npt.NDArray[np.int64]:
    """Return the indices of `values` to keep, in order: all of at most `points`, else about `points`.

    Kept are the minimum, the maximum and one non-finite value of each bucket of neighbours, and both ends of all.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    keep = {0, count - 1}
    for bucket in np.array_split(np.arange(count), max(1, points // 2)):
        finite = np.isfinite(values[bucket])
        if not finite.all():
            keep.add(int(bucket[np.argmin(finite)]))
        keep.add(int(bucket[np.argmin(np.where(finite, values[bucket], np.inf))]))
        keep.add(int(bucket[np.argmax(np.where(finite, values[bucket], -np.inf))]))
    return np.array(sorted(keep), dtype=np.int64)


def evenly(count: int, points: int) -> npt.NDArray[np.int64]:
    """Return at most `points` of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, points)).round().astype(np.int64))


def smooth(values: Numbers) -> Numbers:
    """Return the mean over neighbours on both sides, with weights that halve every two hundredth of the series.

    Both sides, so that it does not lag. Non-finite values do not count. Empty for a series too short to need it.
    """
    if len(values) < MIN_TO_SMOOTH:
        return np.empty(0)
    decay = 0.5 ** (200 / len(values))

    def decayed(series: Numbers) -> Numbers:
        return np.array(list(accumulate(series.tolist(), lambda total, value: decay * total + value)))

    finite = np.isfinite(values)
    known, weights = np.where(finite, values, 0.0), finite.astype(np.float64)
    total, weight = (decayed(each) + decayed(each[::-1])[::-1] - each for each in (known, weights))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > TINY, total / weight, np.nan)


def rounded(values: Sequence[float] | Numbers, digits: int = 6) -> list[float | int | None]:
    """Return numbers for JSON with `digits` significant digits; None for non-finite ones."""
    short = [float(f"{value:.{digits}g}") for value in np.asarray(values, dtype=np.float64).tolist()]
    return [None if not math.isfinite(value) else int(value) if value.is_integer() else value for value in short]
