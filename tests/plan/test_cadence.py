"""Save intervals against the published formulas, and against runs that fail at random."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.cadence import Cadence, hours_between_failures, spare_nodes

LLAMA = Cadence(save=20, restart=600, between_failures=3.09 * 3600)


def wall_time(cadence: Cadence, interval: float, stretches: int, runs: int, seed: int = 0) -> float:
    """Mean seconds of runs of `stretches` intervals of training, each with its save, failing as the cadence says.

    Every attempt is drawn: a stretch that fails part way is tried again after a restart, and so is a restart.
    """
    random, whole = np.random.default_rng(seed), interval + cadence.save
    total, left = np.zeros(runs), np.full(runs, stretches)
    restarting = np.zeros(runs, dtype=bool)
    while left.any():
        active = left > 0
        needed = np.where(restarting, cadence.restart, whole)
        fails = random.exponential(cadence.between_failures, runs)
        failed = (fails < needed) & active
        total += np.where(active, np.minimum(fails, needed), 0.0)
        left -= (active & ~failed & ~restarting).astype(int)
        restarting = np.where(active, failed, restarting)
    return float(total.mean())


def test_the_published_formulas() -> None:
    assert pytest.approx(667, abs=0.5) == LLAMA.young
    assert pytest.approx(654, abs=0.5) == LLAMA.daly
    assert Cadence(10, 60, 5).daly == 5  # saves that take longer than a machine lives


def test_the_optimum_is_that_of_runs_that_fail_at_random() -> None:
    """10,000 runs at each interval: their time is the formula's within 1 %, and none is shorter than at the optimum."""
    stretches = 12
    times = {}
    for interval in (LLAMA.best * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)):
        found = wall_time(LLAMA, interval, stretches, 10_000) / (stretches * interval)  # a second of training
        assert found == pytest.approx(1 / LLAMA.goodput(interval).training, rel=0.01)
        times[interval] = found
    assert min(times, key=times.__getitem__) == LLAMA.best
    assert pytest.approx(0.89, abs=0.005) == LLAMA.goodput(LLAMA.best).training


def test_runs_of_a_machine_that_hardly_lives() -> None:
    """Where the published approximations are far off."""
    cadence = Cadence(save=120, restart=900, between_failures=1800)
    best = cadence.best
    found = wall_time(cadence, best, 12, 10_000) / (12 * best)
    assert found == pytest.approx(1 / cadence.goodput(best).training, rel=0.01)
    for factor in (0.8, 1.25):
        assert cadence.goodput(best).training > cadence.goodput(best * factor).training


@given(st.floats(0.1, 600), st.floats(1, 3600), st.floats(600, 3e6))
def test_shares_add_up_and_the_optimum_is_one(save: float, restart: float, between: float) -> None:
    cadence = Cadence(save, restart, between)
    best = cadence.best
    shares = cadence.goodput(best)
    assert sum(shares) == pytest.approx(1, rel=1e-9)
    assert min(shares) >= -1e-12
    for factor in (0.9, 1.1):
        assert shares.training >= cadence.goodput(best * factor).training * (1 - 1e-9)
    if save < between / 100:
        assert best == pytest.approx(cadence.daly, rel=0.01)


def test_an_interval_is_never_shorter_than_a_flush() -> None:
    slow = LLAMA._replace(flush=1200)
    assert slow.best == 1200
    assert slow.goodput(1200).training < LLAMA.goodput(1200).training


def test_published_rates() -> None:
    assert hours_between_failures(16_384, "llama3") == pytest.approx(3.09, abs=0.005)
    assert hours_between_failures(16_384, "rsc-1") == pytest.approx(1.80, abs=0.005)
    assert hours_between_failures(8, "rsc-1") == hours_between_failures(1, "rsc-1") > 3000


def test_spare_nodes_cover_what_is_in_repair() -> None:
    assert spare_nodes(2048, 3.09, 24) == 15  # 7.8 on average
    assert spare_nodes(8, 3000, 24) == 0
    assert spare_nodes(8, 3000, 100) == 1
    mean, count = 24 / 3.09, 15
    chance = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count + 1))
    assert chance >= 0.99 > chance - math.exp(-mean) * mean**count / math.factorial(count)
