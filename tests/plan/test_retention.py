"""Which checkpoints stay: the newest, and for ever the multiples and the milestones."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.config_sections import CheckpointSection
from minka.plan.retention import Kept, expendable, milestone_passed, permanent


def settings(**values: Any) -> CheckpointSection:
    return CheckpointSection(**values)


@pytest.mark.parametrize(
    ("every", "step", "stays"), [(0, 0, False), (0, 100, False), (100, 99, False), (100, 100, True), (100, 300, True)]
)
def test_a_multiple_stays_for_ever(every: int, step: int, stays: bool) -> None:
    assert permanent(settings(keep_every_steps=every), step, 0, 10) == stays


@pytest.mark.parametrize(
    ("before", "now", "passed"),
    [(0, 99, False), (0, 100, True), (99, 100, True), (100, 101, False), (99, 500, True), (150, 299, False)],
)
def test_a_milestone_is_passed_by_the_first_that_has_consumed_as_much(before: int, now: int, passed: bool) -> None:
    some = settings(keep_tokens=(100, 300))
    assert milestone_passed(some, before, now) == passed
    assert permanent(some, 7, before, now) == passed


@given(st.lists(st.integers(1, 50), unique=True, max_size=8), st.lists(st.integers(1, 9), max_size=40))
def test_each_milestone_is_passed_exactly_once_however_large_the_steps(milestones: list[int], steps: list[int]) -> None:
    some, at, passed = settings(keep_tokens=tuple(milestones)), 0, 0
    for step in steps:
        passed += milestone_passed(some, at, at + step)
        at += step
    reached = {milestone for milestone in milestones if milestone <= at}
    assert bool(reached) == bool(passed)
    assert passed <= len(reached)


def test_the_newest_are_those_saved_last_whatever_their_step() -> None:
    there = [Kept(500, 1), Kept(600, 2), Kept(450, 3), Kept(475, 4)]
    assert expendable(there, 2) == [500, 600]
    assert expendable(there, 4) == expendable(there, 9) == expendable([], 1) == []


def test_a_permanent_one_is_never_expendable_and_counts_among_the_newest() -> None:
    there = [Kept(100, 1, True), Kept(150, 2), Kept(200, 3, True), Kept(250, 4)]
    assert expendable(there, 1) == [150]
    assert expendable(there, 2) == [150]


def test_of_checkpoints_without_a_number_the_highest_step_is_the_newest() -> None:
    """Format 1 had none."""
    assert expendable([Kept(30, 0), Kept(10, 0), Kept(20, 0), Kept(5, 1)], 2) == [10, 20]


@given(
    st.lists(st.builds(Kept, st.integers(0, 20), st.integers(0, 20), st.booleans()), unique_by=lambda kept: kept.step),
    st.integers(1, 5),
)
def test_what_goes_is_older_than_all_that_stay_but_the_permanent(there: list[Kept], newest: int) -> None:
    gone = expendable(there, newest)
    stay = [kept for kept in there if kept.step not in gone]
    assert len(stay) >= min(newest, len(there))
    assert not any(kept.permanent for kept in there if kept.step in gone)
    ages = {kept.step: (kept.number, kept.step) for kept in there}
    passing = [kept for kept in stay if not kept.permanent]
    assert all(ages[step] < ages[kept.step] for step in gone for kept in passing)
    assert gone == sorted(gone, key=ages.__getitem__)
