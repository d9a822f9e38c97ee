"""The curves are those of the ledger: only steps that count, each at its own running time, without pauses."""

import math
from pathlib import Path

import pytest

from ledgers import BATCH, BEGAN, INTERRUPTED, event, page_run, run_of, start, steps


def test_steps_that_were_repeated_are_drawn_once_and_counted(tmp_path: Path) -> None:
    run = page_run(run_of(tmp_path, "a", INTERRUPTED))
    assert run["curves"]["loss"]["step"] == list(range(1, 11))
    assert run["curves"]["loss"]["value"] == [round(4 - n / 100, 6) for n in range(1, 11)]
    assert run["scores"]["bits_per_byte"]["value"] == [1.5]
    assert run["headline"]["steps_void"] == 3
    assert run["headline"]["best"]["bits_per_byte"] == 1.5
    assert run["time"]["repeated"] == pytest.approx(3 * 0.625)


def test_batches_are_what_the_tokens_say_from_wherever_the_run_began(tmp_path: Path) -> None:
    grown = [event("step", n, loss=1.0) | {"tokens": 700 + 10 * n + max(0, n - 12) * 10} for n in range(11, 15)]
    run = page_run(run_of(tmp_path, "a", [start(10) | {"tokens": 800}, *grown]))
    assert run["curves"]["batch_tokens"]["value"] == [10, 10, 20, 20]
    assert page_run(run_of(tmp_path, "b", steps(1, 3)))["curves"]["batch_tokens"]["value"] == [BATCH] * 3


def test_losses_that_are_not_finite_are_gaps_and_marked(tmp_path: Path) -> None:
    lines = [*steps(1, 2), *steps(3, 3, loss=math.nan), *steps(4, 4, loss=math.inf), *steps(5, 5)]
    skip = event("skip", 3, reason="loss is not finite", loss=math.nan)
    run = page_run(run_of(tmp_path, "a", [start(), *lines[:3], skip, *lines[3:]]))
    assert run["curves"]["loss"]["value"] == [3.99, 3.98, None, None, 3.95]
    assert run["curves"]["not_finite"]["step"] == [3, 4]
    assert run["events"]["skip"] == {"step": [3], "tokens": [96], "seconds": [3.5], "text": ["loss is not finite"]}


def test_seconds_of_saving_are_shown_where_something_was_saved(tmp_path: Path) -> None:
    parts = {"data": 0.25, "compute": 0.5, "eval": 0.0}
    lines = [next(steps(n, n, seconds=parts | {"save": 2.0 if n == 3 else 1e-5})) for n in range(1, 6)]
    curves = page_run(run_of(tmp_path, "a", [start(), *lines]))["curves"]
    assert (curves["save"]["step"], curves["save"]["value"]) == ([3], [2])
    assert curves["data"]["value"] == [0.25] * 5
    assert "eval" not in curves


def test_time_is_running_time_without_the_pause(tmp_path: Path) -> None:
    run = page_run(run_of(tmp_path, "a", INTERRUPTED))
    seconds = run["curves"]["loss"]["seconds"]
    assert seconds[:5] == pytest.approx([1.5, 2.5, 3.5, 4.5, 5.5])  # it began half a second before zero
    assert seconds[5:] == pytest.approx([8.5 + n - 4 for n in range(6, 11)])  # 8.5 had passed when it broke off
    assert run["headline"]["running_seconds"] == pytest.approx(14.5)
    assert sum(run["time"].values()) == pytest.approx(14.5)


def test_steps_written_together_are_placed_by_their_own_seconds(tmp_path: Path) -> None:
    together = [{**step, "time": BEGAN + 4} for step in steps(1, 4)]
    run = page_run(run_of(tmp_path, "a", [start(), *together]))
    assert run["curves"]["loss"]["seconds"] == pytest.approx([4.5 - 0.625 * n for n in (3, 2, 1, 0)])
