"""The status of a run follows from its ledger, its exit reason and the clock."""

import os
from pathlib import Path

import pytest

from ledgers import BEGAN, Event, ended, event, page_run, run_of, start, steps


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (0, "done", "finished"),
        (85, "stopped and saved", "stopped"),
        (86, "20 steps refused", "person"),
        (88, "no heartbeat", "failed"),
        (1, "a rank failed", "failed"),
        (77, "", "failed"),
    ],
)
def test_an_ended_run_says_how(code: int, reason: str, kind: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 3)])
    ended(folder, code, 3, reason)
    state = page_run(folder)["status"]
    assert state["kind"] == kind
    assert reason in (state["why"], state["label"], "done")


def test_a_resumed_run_is_running_however_it_ended_before(tmp_path: Path) -> None:
    folder = run_of(
        tmp_path,
        "a",
        [start(), *steps(1, 3), event("stop", 3, reason="stopped and saved"), start(3, 9), *steps(4, 5, late=9)],
    )
    ended(folder, 85, 3, "stopped and saved")
    assert page_run(folder, BEGAN + 20)["status"]["kind"] == "running"
    assert page_run(folder, BEGAN + 10_000)["status"]["kind"] == "silent"


def test_the_exit_reason_of_an_earlier_session_does_not_count(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 8), event("restore", 5, 100), start(5, 100), *steps(6, 7, 100)])
    ended(folder, 85, 8, "stopped and saved")  # beyond where the run is now, but long ago
    os.utime(folder.exit_file, (BEGAN + 9, BEGAN + 9))
    assert page_run(folder, BEGAN + 120)["status"]["kind"] == "running"
    os.utime(folder.exit_file, (BEGAN + 108, BEGAN + 108))
    assert page_run(folder, BEGAN + 120)["status"]["kind"] == "stopped"


def test_an_end_that_is_only_in_the_ledger_counts(tmp_path: Path) -> None:
    lines = [
        start(),
        *steps(1, 3),
        event("stop", 3, reason="stopped by a rule"),
        event("save_failed", 3, reason="export"),
    ]
    assert page_run(run_of(tmp_path, "a", lines))["status"]["kind"] == "person"


@pytest.mark.parametrize("lines", [[], [start()]])
def test_a_run_without_a_step_has_a_page_of_its_own(lines: list[Event], tmp_path: Path) -> None:
    run = page_run(run_of(tmp_path, "a", lines))
    assert run["curves"] == {}
    assert run["status"]["label"] == ("starting" if lines else "not started")
    assert (run["headline"]["step"], run["headline"]["loss"]) == (0, None)
