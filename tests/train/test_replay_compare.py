"""Which steps a ledger records, where each is replayed from, and when a recorded and a replayed step are the same."""

import math
import re
from typing import Any

import pytest

from minka.plan.errors import UserError
from minka.plan.ledger import current
from minka.train.replay_compare import (
    check_comparable,
    checkpoint_before,
    difference,
    differences,
    recorded_run,
    verdicts,
)


def events(text: str) -> list[dict[str, Any]]:
    """ "start 0, step 1 3, save 2": steps 1 to 3, and so on."""
    found: list[dict[str, Any]] = []
    for words in (part.split() for part in text.split(",") if part):
        first, last = int(words[1]), int(words[-1])
        found += [{"event": words[0], "step": step, "line": len(found)} for step in range(first, last + 1)]
    return found


STORY = "start 0, step 1 6, save 4, step 7 9, restore 4, start 4, step 5 8, save 8, step 9 9"


def test_discarded_steps_do_not_count_until_they_are_taken_again() -> None:
    found = recorded_run(events(STORY.removesuffix(", step 9 9")))
    assert (sorted(found.steps), found.void) == (list(range(1, 9)), {9: 4})
    found = recorded_run(events(STORY))
    assert (sorted(found.steps), found.void) == (list(range(1, 10)), {})


def test_the_steps_that_count_are_those_of_current() -> None:
    for text in (STORY, STORY + ", restart 0, start 0, step 1 2", STORY + ", rewind 8, step 9 11, restore 8, step 9 9"):
        lines = {e["step"]: e["line"] for e in current(events(text)) if e["event"] == "step"}
        assert {step: line.event["line"] for step, line in recorded_run(events(text)).steps.items()} == lines


def test_a_step_has_the_settings_of_the_start_before_it() -> None:
    found = recorded_run(events(STORY))
    assert [found.steps[step].start["step"] for step in (4, 5)] == [0, 4]


def test_checkpoints_of_a_discarded_lineage_are_not_replayed_from() -> None:
    found = recorded_run(events("start 0, step 1 9, save 3, save 6, restore 3, start 3, step 4 8"))
    assert found.saves == {3}
    assert checkpoint_before(found, 8, [3, 6], "run") == 3
    # The machine was gone between the checkpoint and its line: the restore vouches for it.
    found = recorded_run(events("start 0, step 1 9, restore 8, start 8, step 9 9"))
    assert checkpoint_before(found, 9, [8], "run") == 8
    assert recorded_run(events(STORY + ", restart 0")).saves == set()


def test_a_step_is_replayed_from_the_newest_checkpoint_before_it_or_from_the_start_of_the_run() -> None:
    found = recorded_run(events("start 0, step 1 20, save 5, save 10, save 15, save 20"))
    there = [5, 10, 15, 20]
    assert [checkpoint_before(found, step, there, "run") for step in (1, 5, 6, 10, 11, 20)] == [
        None,
        None,
        5,
        5,
        10,
        15,
    ]
    assert checkpoint_before(found, 5, [], "run") is None


@pytest.mark.parametrize(
    ("text", "step", "on_disk", "what", "remedy"),
    [
        ("start 0, step 1 20, save 5, save 10, save 15, save 20", 8, [15, 20], {"8"}, [1, 5, 16, 20]),
        ("start 0, step 1 20, save 5, save 10, save 15, save 20", 8, [20], {"8"}, [1, 5]),
        ("start 0, step 1 20, save 5, save 10, save 15, save 20", 21, [20], {"21"}, [1, 20]),
        ("", 1, [], {"1"}, []),
        ("start 0, step 1 9, save 4, restore 4, start 4, step 5 6", 9, [4], {"9", "4"}, [1, 6]),
    ],
)
def test_a_step_that_cannot_be_replayed_is_refused_with_those_that_can(
    text: str, step: int, on_disk: list[int], what: set[str], remedy: list[int]
) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint_before(recorded_run(events(text)), step, on_disk, "run")
    assert caught.value.where == "run"
    assert set(re.findall(r"\d+", caught.value.what)) == what
    assert [int(number) for number in re.findall(r"\d+", caught.value.remedy)] == remedy


def test_differences_are_relative_and_refused_steps_are_like_themselves() -> None:
    assert difference(2.0, 2.0) == difference(math.nan, math.nan) == difference(math.inf, math.inf) == 0
    assert difference(2.0, 1.0) == difference(1.0, 2.0) == 0.5
    assert difference(math.nan, 1.0) == difference(1.0, math.inf) == math.inf


@pytest.mark.parametrize("odd", [None, "x", [], True])
def test_only_numbers_are_compared(odd: object) -> None:
    line: dict[str, Any] = {"step": 6, "loss": 4.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    assert set(differences({**line, "learning_rate": odd}, line)) == {"loss", "grad_norm"}
    assert differences({**line, "loss": 10**400}, line)["loss"]["difference"] == math.inf


@pytest.mark.parametrize("lost", [("loss",), ("grad_norm",), ("loss", "grad_norm")])
@pytest.mark.parametrize("odd", [{}, None, "x"])
def test_a_step_without_its_numbers_is_refused(lost: tuple[str], odd: object) -> None:
    line: dict[str, Any] = {"step": 6, "loss": math.nan, "grad_norm": 1.0, "learning_rate": 1e-3, "target_count": 409}
    check_comparable(line, "ledger")
    for name in lost:
        line.pop(name) if odd == {} else line.update({name: odd})
    with pytest.raises(UserError) as caught:
        check_comparable(line, "ledger")
    assert {"6", *lost} <= set(caught.value.what.split())


@pytest.mark.parametrize(
    ("changed", "fp32", "bf16"),
    [
        ({}, "bit for bit", "bit for bit"),
        ({"loss": 4.0 * (1 + 1e-6)}, "equal to rounding", "equal to rounding"),
        ({"loss": 4.0 * (1 + 1e-5)}, "differs", "equal to rounding"),
        ({"loss": 4.0 * (1 + 1e-2)}, "differs", "differs"),
        ({"grad_norm": 1.0 + 1e-5}, "equal to rounding", "equal to rounding"),
        ({"grad_norm": 1.0 + 1e-3}, "differs", "equal to rounding"),
        ({"grad_norm": 1.2}, "differs", "differs"),
        ({"learning_rate": 1e-3 * (1 + 1e-6)}, "differs", "differs"),
        ({"target_count": 408}, "differs", "differs"),
        ({"loss": math.nan}, "differs", "differs"),
    ],
)
def test_a_verdict_follows_from_the_bounds_of_the_dtype(changed: dict[str, float], fp32: str, bf16: str) -> None:
    line = {"loss": 4.0, "grad_norm": 1.0, "learning_rate": 1e-3, "target_count": 409, "z_loss": 7.0}
    compared = differences(line, line | changed)
    assert set(compared) == {"loss", "grad_norm", "learning_rate", "target_count"}
    assert (verdicts({7: compared}, "float32"), verdicts({7: compared}, "bfloat16")) == ({7: fp32}, {7: bf16})


def steps_apart(*apart: float) -> dict[int, dict[str, dict[str, float]]]:
    """Steps with these differences."""
    return {step: {"loss": {"difference": d}, "grad_norm": {"difference": d}} for step, d in enumerate(apart, 1)}


@pytest.mark.parametrize(
    ("apart", "found"),
    [
        ((0.0, 1e-7, 8e-7), ["bit for bit", "equal to rounding", "equal to rounding"]),
        ((1e-6, 8e-6, 7e-5, 2e-6), ["equal to rounding", *["rounding that grew"] * 2, "equal to rounding"]),
        ((1e-6, 2e-5, 1e-4), ["equal to rounding", "differs", "differs"]),  # a jump, and what comes of it
        ((3e-6,), ["differs"]),  # nothing has had the time to grow
        (
            (1e-6, 9e-6, 1e-6, 8e-5),
            ["equal to rounding", "rounding that grew"] * 2,
        ),
    ],
)
def test_rounding_may_grow_from_step_to_step_and_not_jump(apart: tuple[float, ...], found: list[str]) -> None:
    assert list(verdicts(steps_apart(*apart), "float32").values()) == found
