"""Running time leaves out the pauses between sessions and places each step by its own seconds."""

from pathlib import Path

import pytest

from ledgers import BEGAN, INTERRUPTED, page_run, run_of, start, steps


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
