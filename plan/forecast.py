"""Where a loss curve ends, and whether a run that is under way can still reach its target.

A flat stretch says nothing by itself: every curve looks flat on a linear axis, and a stable phase looks flat until the
rate decays. So a run is judged by the best end that its curve still allows.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Action = Literal["continue", "probe", "stop"]
BINS = 6  # of an octave of tokens: medians of them are what is fitted
WINDOWS = (1.0, 2.5)  # octaves of the newest tokens: a curve that has just turned is another one since
POWERS = tuple(x / 20 for x in range(2, 25))  # of E + A / t^power
LIKELY = 4.0  # times the least squared error: fits up to there are possible ends
FEWEST = 6  # medians
NOISE = 0.003  # of the loss: fits are not told apart by less


class Point(NamedTuple):
    """Of a curve: tokens, nats a token, and the learning rate as a share of its peak."""

    tokens: float
    loss: float
    rate: float = 1.0


class Forecast(NamedTuple):
    """The loss at the end: the best and the worst that the curve allows, and the likely one."""

    low: float
    value: float
    high: float


class CheckRules(NamedTuple):
    """When a run is not worth its money."""

    earliest: float = 0.25  # of the tokens: before that only a run that diverges is judged
    margin: float = 0.015  # of the target, by which even the best end must miss it: noise of seeds and of the law
    annealing: float = 0.065  # of the loss, that a decay of the rate to nothing may still gain
    most_annealing: float = 0.1  # of the loss, that no decay gains: beyond it a probe would tell nothing
    diverged: float = 0.12  # of the loss, above the lowest so far


RULES = CheckRules()


class CheckVerdict(NamedTuple):
    """What to do, in a word and in a sentence."""

    action: Action
    reason: str
    forecast: Forecast | None


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Medians of bins that are equally wide in ln tokens: without noise and spikes, and as many early as late."""
    bins: dict[int, list[Point]] = {}
    for point in points:
        if point.tokens > 0 and math.isfinite(point.loss):
            bins.setdefault(math.floor(BINS * math.log2(point.tokens)), []).append(point)
    found = []
    for number in sorted(bins):
        inside = sorted(bins[number], key=lambda point: point.loss)
        tokens = math.exp(sum(math.log(point.tokens) for point in inside) / len(inside))
        found.append(Point(tokens, inside[len(inside) // 2].loss, sum(point.rate for point in inside) / len(inside)))
    return found


def forecast(points: Sequence[Point], end: float, final_rate: float = 0.0, annealing: float = 0.065) -> Forecast | None:
    """Fit E + A / t^power, A >= 0, to the newest octaves for every power, and see where the likely ones end.

    What the rate's decay still gains is at most `annealing` of the loss, by the share of the peak that is left to lose.
    None where there are too few points.
    """
    every = smoothed(points)
    if len(every) < FEWEST:
        return None
    ends = [_ends([point for point in every if point.tokens >= every[-1].tokens / 2**wide], end) for wide in WINDOWS]
    gain = annealing * max(0.0, every[-1].rate - final_rate)
    low = min(every[-1].loss, *(one.low for one in ends))  # a rate that decays bends the curve below every fit
    high = max(one.high for one in ends)
    return Forecast(low * (1 - gain), min(high, ends[-1].value * (1 - gain / 2)), high)


def _ends(points: Sequence[Point], end: float) -> Forecast:
    fits = [_fitted(points, power, end) for power in POWERS]
    least = min(error for error, _ in fits)
    noise = (NOISE * points[-1].loss) ** 2 * len(points)
    likely = [at_end for error, at_end in fits if error <= LIKELY * least + noise]
    return Forecast(min(likely), min(fits)[1], max(likely))


def _fitted(points: Sequence[Point], power: float, end: float) -> tuple[float, float]:
    """The squared error of the best E and A >= 0, and their loss at the end."""
    xs, ys = [point.tokens**-power for point in points], [point.loss for point in points]
    count = len(points)
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = max(0.0, sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread)
    floor = y_mean - slope * x_mean
    if floor < 0:  # no loss is below 0: the best line through it
        floor, slope = 0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)
    error = sum((floor + slope * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
    return error, floor + slope * end**-power


def check_run(
    points: Sequence[Point],
    end: float,
    target: float,
    *,
    final_rate: float = 0.0,
    stable: bool = False,
    rules: CheckRules = RULES,
) -> CheckVerdict:
    """Return what to do with a run of `end` tokens whose loss should end at `target`.

    stable: the rate is constant now and decays later. Then a curve does not show what the decay will gain, and a run
    is stopped only where no decay would be enough; where one might be, a branch with a short decay tells (a probe).
    """
    curve = smoothed(points)
    if len(curve) < FEWEST:
        return CheckVerdict("continue", f"{len(curve)} points are too few to judge", None)
    seen, newest = curve[-1].tokens / end, curve[-1]
    lowest = min(point.loss for point in curve)
    found = forecast(points, end, final_rate, rules.annealing)
    assert found is not None
    bar = target * (1 + rules.margin)
    where = f"at {seen:.0%} of the tokens the loss is {newest.loss:.3f}"
    if all(point.loss > lowest * (1 + rules.diverged) for point in curve[-2:]) and newest.loss > bar:
        reason = f"{where}, {newest.loss / lowest - 1:.0%} above its lowest: it diverges"
        return CheckVerdict("stop", reason, found)
    ends = f"it ends between {found.low:.3f} and {found.high:.3f}"
    if found.low <= bar:
        return CheckVerdict("continue", f"{where}; {ends}, and {target:.3f} is in reach", found)
    if seen < rules.earliest:
        reason = f"{where}; {ends}, above {target:.3f}, but before {rules.earliest:.0%} nothing is decided"
        return CheckVerdict("continue", reason, found)
    if stable:
        most = forecast(points, end, final_rate, rules.most_annealing)
        if most is not None and most.low <= bar:
            reason = f"{where}; {ends}, above {target:.3f}, unless the decay gains more: branch off a short one"
            return CheckVerdict("probe", reason, found)
    reason = f"{where}; even at best {ends[3:]}, and {target:.3f} is out of reach"
    return CheckVerdict("stop", reason, found)
