"""The check on simulated runs: doomed ones are stopped early, and those that would win go on."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from minka.plan.forecast import CheckRules, CheckVerdict, Point, check_run, forecast, smoothed
from minka.plan.loss_laws import EPOCH

SIZE, TOKENS = 1e9, 20e9
TARGET = EPOCH.loss(SIZE, TOKENS)
EVALUATIONS = 40  # at equal distances


class Run(NamedTuple):
    """A simulated run: its loss without noise and its rate, by the share of tokens seen; what becomes of it."""

    loss: Callable[[float], float]
    rate: Callable[[float], float]
    wins: bool
    stable: bool = False


def healthy(pick: random.Random, *, wsd: bool = False) -> Run:
    """Ends within a percent of the target; before the decay it is 4 to 7 % above what a decay would make of it."""
    quality, extra = pick.uniform(0.985, 1.008), pick.uniform(0.03, 0.06)
    beta = pick.uniform(0.3, 0.45)
    start = TARGET - EPOCH.E

    def rate(at: float) -> float:
        if wsd:
            return 1.0 if at < 0.8 else (1 - at) / 0.2
        return 0.5 * (1 + math.cos(math.pi * at))

    def loss(at: float) -> float:
        base = EPOCH.E + start * max(at, 1e-4) ** -beta
        warm = 4 * math.exp(-at / 0.002)
        return (base + warm) * quality * (1 + extra * rate(at))

    return Run(loss, rate, wins=True, stable=wsd)


def late(pick: random.Random) -> Run:
    """Rests on a plateau until 5 to 20 % of its tokens, then catches up."""
    run, turn, height = healthy(pick), pick.uniform(0.05, 0.2), pick.uniform(0.1, 0.4)
    return run._replace(loss=lambda at: run.loss(at) * (1 + height / (1 + math.exp((at - turn) / 0.012))))


def flat(pick: random.Random) -> Run:
    """Stops improving at 2 to 12 % of its tokens."""
    run, until = healthy(pick, wsd=pick.random() < 0.5), pick.uniform(0.02, 0.12)
    return run._replace(loss=lambda at: max(run.loss(at), run.loss(until)), wins=False)


def broken(pick: random.Random) -> Run:
    """Jumps at 5 to 20 % of its tokens and recovers half of it."""
    run, when, height = healthy(pick), pick.uniform(0.05, 0.2), pick.uniform(0.3, 0.8)

    def loss(at: float) -> float:
        return run.loss(at) * (1 + (at > when) * height * (0.5 + 0.5 * math.exp(-(at - when) / 0.05)))

    return run._replace(loss=loss, wins=False)


def diverging(pick: random.Random) -> Run:
    """Rises from 3 to 15 % of its tokens on."""
    run, when, speed = healthy(pick), pick.uniform(0.03, 0.15), pick.uniform(2, 8)
    return run._replace(loss=lambda at: run.loss(at) * (1 + speed * max(0.0, at - when)), wins=False)


def worse(pick: random.Random) -> Run:
    """Learns as it should, from a worse start: 15 to 40 % above the target at the end."""
    run, factor = healthy(pick, wsd=pick.random() < 0.5), pick.uniform(1.15, 1.4)
    return run._replace(loss=lambda at: run.loss(at) * factor, wins=False)


KINDS: dict[str, Callable[[random.Random], Run]] = {
    "healthy": healthy,
    "stable": lambda pick: healthy(pick, wsd=True),
    "late": late,
    "flat": flat,
    "broken": broken,
    "diverging": diverging,
    "worse": worse,
}


def points(run: Run, seed: int, count: int = 1000) -> list[Point]:
    """With the noise of batches, and a spike now and then."""
    pick = random.Random(seed)
    found = []
    for number in range(1, count + 1):
        at = number / count
        spike = pick.uniform(0.2, 1.0) if pick.random() < 0.003 else 0.0
        found.append(Point(at * TOKENS, run.loss(at) * (1 + pick.gauss(0, 0.012)) + spike, run.rate(at)))
    return found


def verdicts(run: Run, seed: int) -> Iterator[tuple[float, CheckVerdict]]:
    """At each evaluation until it is stopped."""
    curve = points(run, seed)
    for number in range(1, EVALUATIONS):
        at = number / EVALUATIONS
        until = [point for point in curve if point.tokens <= at * TOKENS]
        found = check_run(until, TOKENS, TARGET, stable=run.stable and at < 0.8)
        yield at, found
        if found.action == "stop":
            return


@pytest.mark.parametrize("kind", KINDS)
def test_doomed_runs_stop_by_30_percent_and_winners_go_on(kind: str) -> None:
    """At least 90 % of the doomed, at most 2 % of the winners: 40 runs of each of seven kinds."""
    ends: Counter[str] = Counter()
    for seed in range(40):
        run = KINDS[kind](random.Random(seed))
        last, verdict = list(verdicts(run, seed))[-1]
        assert verdict.reason.endswith(("reach", "diverges", "one", "decided", "judge")), verdict.reason
        ends["stopped early" if verdict.action == "stop" and last <= 0.3 else verdict.action] += 1
    print(f"{kind}: {dict(ends)}")
    if kind in ("healthy", "stable", "late"):
        assert ends["stop"] + ends["stopped early"] == 0
    else:
        assert ends["stopped early"] >= 36


def test_a_forecast_has_the_end_of_a_healthy_run() -> None:
    for seed in range(20):
        run = healthy(random.Random(seed))
        curve = points(run, seed)
        for share in (0.3, 0.5, 0.8):
            found = forecast([point for point in curve if point.tokens <= share * TOKENS], TOKENS)
            assert found is not None
            assert found.low <= run.loss(1.0) * 1.01
            assert found.high >= run.loss(1.0) * 0.99
            assert found.low <= found.value <= found.high


def test_a_stable_phase_that_misses_by_little_is_probed() -> None:
    run = healthy(random.Random(1), wsd=True)
    high = run._replace(loss=lambda at: run.loss(at) * 1.075)
    actions = {verdict.action for at, verdict in verdicts(high, 1) if 0.5 < at < 0.8}
    assert "probe" in actions


def test_smoothing_takes_spikes_away() -> None:
    curve = [Point(float(number), 5.0 if number % 50 == 0 else 2.0) for number in range(1, 400)]
    assert max(point.loss for point in smoothed(curve)[20:]) == 2.0
    assert smoothed([Point(1.0, math.nan), Point(0.0, 2.0)]) == []


def test_few_points_say_nothing() -> None:
    assert check_run([Point(1e9, 3.0)], TOKENS, TARGET).action == "continue"
    assert forecast([Point(1e9, 3.0)], TOKENS) is None


def test_the_rules_decide() -> None:
    run = flat(random.Random(3))
    curve = [point for point in points(run, 3) if point.tokens <= 0.5 * TOKENS]
    assert check_run(curve, TOKENS, TARGET).action == "stop"
    later = CheckRules(earliest=0.9)
    assert check_run(curve, TOKENS, TARGET, rules=later).action == "continue"
    assert check_run(curve, TOKENS, 10.0).action == "continue"
