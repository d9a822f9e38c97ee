"""The order of samples: a keyed bijection with random access, and dropped ranges that are skipped."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.data.sample_order import SampleOrder, permute, window_count


@given(count=st.integers(1, 5_000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_bijection(count: int, seed: int, epoch: int) -> None:
    sent = permute(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(sent), np.arange(count))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 2**14, 2**14 + 1, 100_003])
def test_bijection_at_the_edges_of_powers_of_two(count: int) -> None:
    sent = permute(np.arange(count), count, 7, 0)
    assert np.array_equal(np.sort(sent), np.arange(count))


@given(count=st.integers(2**30, 2**40), at=st.lists(st.integers(0, 2**30 - 1), min_size=1, max_size=20))
def test_an_index_has_the_same_image_alone_as_among_others(count: int, at: list[int]) -> None:
    together = permute(np.array(at), count, 3, 1)
    assert together.tolist() == [int(permute(np.array([i]), count, 3, 1)[0]) for i in at]
    assert bool(((together >= 0) & (together < count)).all())


def test_the_order_is_pinned() -> None:
    """A run started with one version must continue in the same order with the next."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [4, 0, 6, 9, 8, 1, 5, 2, 3, 7]
    assert permute(np.array([0, 1, 500_000, 1_000_002]), 1_000_003, 42, 3).tolist() == [
        167527,
        128119,
        316592,
        710580,
    ]


def test_seeds_and_epochs_give_orders_that_look_independent() -> None:
    count = 2_000
    orders = [permute(np.arange(count), count, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in [np.arange(count), *orders[:i]]:
            assert np.count_nonzero(one == other) < 12  # the mean is 1; 12 has a chance of 1e-9
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.12  # five standard deviations of 1/sqrt(count)


def test_neighbours_are_spread_over_the_whole_epoch() -> None:
    count = 100_000
    steps = np.diff(permute(np.arange(count), count, 1, 0))
    assert abs(np.abs(steps).mean() / count - 1 / 3) < 0.01  # mean distance of two random places


@given(
    cuts=st.lists(st.integers(0, 300), max_size=8, unique=True),
    first=st.integers(0, 100),
    size=st.integers(0, 150),
)
def test_dropped_ranges_are_skipped_and_nothing_else_moves(cuts: list[int], first: int, size: int) -> None:
    cuts.sort()
    dropped = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    left = [p for p in range(1_000) if not any(a <= p < b for a, b in dropped)]
    assert SampleOrder(50, 0, dropped).positions(first, first + size).tolist() == left[first : first + size]


def test_each_epoch_has_every_window_once_in_a_different_order() -> None:
    order = SampleOrder(37, seed=5)
    windows = order.windows_at(order.positions(0, 3 * 37)).reshape(3, 37)
    for epoch in windows:
        assert sorted(epoch) == list(range(37))
    assert not np.array_equal(windows[0], windows[1])
    assert order.windows_at([40]) == windows[1][3]


@pytest.mark.parametrize(("tokens", "windows"), [(2, 1), (16, 1), (17, 1), (18, 2), (33, 2), (34, 3)])
def test_a_window_begins_wherever_a_target_is_left(tokens: int, windows: int) -> None:
    assert window_count(tokens, 16) == windows


def test_permuting_costs_no_more_than_an_order_of_magnitude_beyond_numpys_own_shuffle() -> None:
    """In CPU time: this order needs no array of all indices, and must not be paid for in speed."""
    count = 1_000_000
    indices = np.arange(count)

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    ours, theirs = (
        min(seconds(work) for _ in range(3))
        for work in (lambda: permute(indices, count, 0, 0), lambda: np.random.default_rng(0).permutation(count))
    )
    assert ours < 15 * theirs
