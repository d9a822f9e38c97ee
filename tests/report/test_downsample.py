"""Downsampling keeps every spike, every gap and both ends."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.report.downsample import downsample, evenly, rounded, smooth

SERIES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=400)


@given(SERIES, st.integers(4, 60))
def test_the_least_the_greatest_and_both_ends_are_kept_in_order(values: list[float], points: int) -> None:
    series = np.array(values)
    kept = downsample(series, points)
    assert list(kept) == sorted(set(kept.tolist()))
    assert {0, len(values) - 1} <= set(kept.tolist())
    assert len(kept) <= max(points, 3 * (points // 2) + 2)
    finite = series[np.isfinite(series)]
    if len(finite):
        assert {finite.min(), finite.max()} <= set(series[kept].tolist())


@given(st.lists(st.floats(0, 9) | st.just(math.nan), min_size=61, max_size=200), st.integers(4, 60))
def test_a_series_with_a_gap_has_one_after_thinning(values: list[float], points: int) -> None:
    series = np.array(values)
    assert np.isfinite(series).all() == np.isfinite(series[downsample(series, points)]).all()


def test_no_spike_of_a_long_run_is_lost_and_few_points_are_left() -> None:
    series = np.sin(np.arange(100_000) / 500)
    spikes = np.arange(137, 100_000, 2_311)
    series[spikes] = 9 + spikes / 1e6
    kept = downsample(series, 2_000)
    assert set(spikes.tolist()) <= set(kept.tolist())
    assert len(kept) <= 2_002


def test_a_short_series_is_left_alone() -> None:
    assert downsample(np.arange(50.0), 50).tolist() == list(range(50))


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (6, 5), (1_000, 7), (3, 2)])
def test_spread_is_even_and_keeps_both_ends(count: int, most: int) -> None:
    kept = evenly(count, most).tolist()
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert max(np.diff(kept), default=0) - min(np.diff(kept), default=0) <= 1


def test_smoothing_does_not_lag_behind_a_slope() -> None:
    line = np.linspace(8.0, 2.0, 2_000)
    assert np.abs(smooth(line) - line)[200:-200].max() < 1e-3


def test_smoothing_passes_over_what_is_not_finite() -> None:
    series = np.full(300, 2.0)
    series[[0, 7, 8, 150, 299]] = [math.nan, math.inf, -math.inf, math.nan, math.nan]
    assert smooth(series) == pytest.approx(np.full(300, 2.0))
    assert np.isnan(smooth(np.full(300, math.nan))).all()


def test_a_series_too_short_for_it_is_not_smoothed() -> None:
    assert len(smooth(np.ones(99))) == 0


def test_numbers_for_the_page_are_short_and_none_where_there_is_none() -> None:
    assert rounded([1.0, 0.1 + 0.2, math.nan, math.inf, 1e-9, 123456789.0], 6) == [1, 0.3, None, None, 1e-9, 123457000]
    assert [type(n) for n in rounded([3.0, 0.5])] == [int, float]
