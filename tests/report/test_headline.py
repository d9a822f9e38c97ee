"""The headline compares the run with its plan and says how the remaining time was estimated."""

from pathlib import Path

import pytest

from ledgers import BATCH, BEGAN, INTERRUPTED, ended, page_run, run_of, start, steps


def test_the_plan_comes_from_the_configuration_and_the_time_left_names_its_steps(tmp_path: Path) -> None:
    running = page_run(run_of(tmp_path, "a", [start(), *steps(1, 4)]), BEGAN + 5)["headline"]["plan"]
    assert (running["steps"], running["tokens"], running["done"]) == (10, 10 * BATCH, 0.4)
    assert running["seconds_left"] == pytest.approx(6.0)
    assert "last 4 steps" in running["seconds_left_from"]
    ends = {"name": "b", "max_tokens": 8 * BATCH, "max_steps": None}
    by_tokens = run_of(tmp_path, "b", [start(), *steps(1, 4, tokens=6 * BATCH)], run=ends)
    assert page_run(by_tokens)["headline"]["plan"]["done"] == 0.75
    at_its_end = page_run(run_of(tmp_path, "d", [start(), *steps(1, 10)]), BEGAN + 11)  # and still being scored
    assert (at_its_end["status"]["kind"], at_its_end["headline"]["plan"]["seconds_left"]) == ("running", None)
    finished = run_of(tmp_path, "c", INTERRUPTED)
    ended(finished, 0, 10)
    assert page_run(finished)["headline"]["plan"]["seconds_left"] is None
