"""The page's numbers are those of the ledger: what a return made void is out, time is running time, plans are kept."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from ledgers import BATCH, BEGAN, Event, ended, event, run_of, score, start, steps
from minka.plan.run_folder import RunFolder
from minka.report.page_data import checkpoints, distinct_names, page_data
from minka.report.run_files import read_run_files

PAUSE = 1000.0
BROKEN_OFF: list[Event] = [  # killed after step 8; taken up again at step 5, with another rate, 1,000 s later
    start(),
    *steps(1, 5),
    event(
        "save", 5, path="x/checkpoints/step-00000005", bytes=10, stall_seconds=0.5, total_seconds=2.0, permanent=True
    ),
    *steps(6, 8, loss=99.0),
    score(8, 9.0),
    event("fallback", 5, 8 + PAUSE, path="x/checkpoints/step-00000007", reason="a hash is wrong"),
    event("restore", 5, 8 + PAUSE, reason="the run is going on"),
    start(5, 9 + PAUSE, changed={"optimizer.learning_rate": [1e-3, 2e-3]}),
    *steps(6, 10, late=PAUSE + 4),
    score(10, 1.5),
    event("stop", 10, 10 + PAUSE + 4, reason="done"),
]


def page_of(folder: RunFolder, now: float = BEGAN + 30) -> dict[str, Any]:
    shown: dict[str, Any] = page_data([read_run_files(str(folder.path))], now)["runs"][0]
    return shown


def test_what_a_return_made_void_is_not_drawn_and_is_counted(tmp_path: Path) -> None:
    run = page_of(run_of(tmp_path, "a", BROKEN_OFF))
    assert run["curves"]["loss"]["step"] == list(range(1, 11))
    assert run["curves"]["loss"]["value"] == [round(4 - n / 100, 6) for n in range(1, 11)]
    assert run["scores"]["bits_per_byte"]["value"] == [1.5]
    assert run["headline"]["steps_void"] == 3
    assert run["headline"]["best"]["value"] == 1.5
    assert run["time"]["repeated"] == pytest.approx(3 * 0.625)


def test_time_is_running_time_without_the_pause(tmp_path: Path) -> None:
    run = page_of(run_of(tmp_path, "a", BROKEN_OFF))
    seconds = run["curves"]["loss"]["seconds"]
    assert seconds[:5] == pytest.approx([1.5, 2.5, 3.5, 4.5, 5.5])  # it began half a second before zero
    assert seconds[5:] == pytest.approx([8.5 + n - 4 for n in range(6, 11)])  # 8.5 had passed when it broke off
    assert run["headline"]["running_seconds"] == pytest.approx(14.5)
    assert sum(run["time"].values()) == pytest.approx(14.5)


def test_steps_written_together_are_placed_by_their_own_seconds(tmp_path: Path) -> None:
    together = [{**step, "time": BEGAN + 4} for step in steps(1, 4)]
    run = page_of(run_of(tmp_path, "a", [start(), *together]))
    assert run["curves"]["loss"]["seconds"] == pytest.approx([4.5 - 0.625 * n for n in (3, 2, 1, 0)])


def test_batches_are_what_the_tokens_say_from_wherever_the_run_began(tmp_path: Path) -> None:
    grown = [event("step", n, loss=1.0) | {"tokens": 700 + 10 * n + max(0, n - 12) * 10} for n in range(11, 15)]
    run = page_of(run_of(tmp_path, "a", [start(10) | {"tokens": 800}, *grown]))
    assert run["curves"]["batch_tokens"]["value"] == [10, 10, 20, 20]
    assert page_of(run_of(tmp_path, "b", steps(1, 3)))["curves"]["batch_tokens"]["value"] == [BATCH] * 3


def test_losses_that_are_not_finite_are_gaps_and_marked(tmp_path: Path) -> None:
    lines = [*steps(1, 2), *steps(3, 3, loss=math.nan), *steps(4, 4, loss=math.inf), *steps(5, 5)]
    skip = event("skip", 3, reason="loss is not finite", loss=math.nan)
    run = page_of(run_of(tmp_path, "a", [start(), *lines[:3], skip, *lines[3:]]))
    assert run["curves"]["loss"]["value"] == [3.99, 3.98, None, None, 3.95]
    assert run["curves"]["not_finite"]["step"] == [3, 4]
    assert run["events"]["skip"] == {"step": [3], "tokens": [96], "seconds": [3.5], "text": ["loss is not finite"]}


def test_seconds_of_saving_are_shown_where_something_was_saved(tmp_path: Path) -> None:
    parts = {"data": 0.25, "compute": 0.5, "eval": 0.0}
    lines = [next(steps(n, n, seconds=parts | {"save": 2.0 if n == 3 else 1e-5})) for n in range(1, 6)]
    curves = page_of(run_of(tmp_path, "a", [start(), *lines]))["curves"]
    assert (curves["save"]["step"], curves["save"]["value"]) == ([3], [2])
    assert curves["data"]["value"] == [0.25] * 5
    assert "eval" not in curves


def test_every_kind_of_event_is_marked_where_it_happened(tmp_path: Path) -> None:
    marks = page_of(run_of(tmp_path, "a", BROKEN_OFF))["events"]
    found = {kind: (of["step"], of["text"]) for kind, of in marks.items()}
    assert found == {
        "start": ([0], ["2 ranks on a processor"]),
        "changed": ([5], ["optimizer.learning_rate: 0.001 → 0.002"]),
        "save": ([5], ["10 B, kept forever"]),
        "eval": ([10], ["heldout 1.5000 bits per byte"]),
        "restore": ([5], ["the run is going on"]),
        "fallback": ([5], ["step-00000007: a hash is wrong"]),
        "stop": ([10], ["done"]),
    }


def test_the_plan_is_the_configurations_and_the_time_left_says_from_what(tmp_path: Path) -> None:
    running = page_of(run_of(tmp_path, "a", [start(), *steps(1, 4)]), BEGAN + 5)["headline"]["plan"]
    assert (running["steps"], running["tokens"], running["done"]) == (10, 10 * BATCH, 0.4)
    assert running["seconds_left"] == pytest.approx(6.0)
    assert "last 4 steps" in running["seconds_left_from"]
    ends = {"name": "b", "max_tokens": 8 * BATCH, "max_steps": None}
    by_tokens = run_of(tmp_path, "b", [start(), *steps(1, 4, tokens=6 * BATCH)], run=ends)
    assert page_of(by_tokens)["headline"]["plan"]["done"] == 0.75
    at_its_end = page_of(run_of(tmp_path, "d", [start(), *steps(1, 10)]), BEGAN + 11)  # and still being scored
    assert (at_its_end["status"]["kind"], at_its_end["headline"]["plan"]["seconds_left"]) == ("running", None)
    finished = run_of(tmp_path, "c", BROKEN_OFF)
    ended(finished, 0, 10)
    assert page_of(finished)["headline"]["plan"]["seconds_left"] is None


def test_scores_made_afterwards_join_those_of_the_ledger(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 6), score(6, 1.5)])
    for step, name, bits in (
        (4, "heldout@1", 1.75),
        (6, "heldout@1", 1.0),
        (4, "heldout@1-abcd", 1.8),
        (9, "heldout@1", 0.1),
    ):
        (folder.evals / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        result = {
            "suite": "heldout",
            "step": step,
            "tokens": step * BATCH,
            "scores": {"bits_per_byte": bits},
            "stderr": {},
        }
        (folder.evals / f"step-{step:08d}" / f"{name}.json").write_text(json.dumps(result))
    found = page_of(folder)["scores"]
    assert {name: (s["step"], s["value"], s["seconds"]) for name, s in found.items()} == {
        "heldout: bits_per_byte": ([4, 6], [1.75, 1.5], [4.5, 6.5]),  # step 9 is of steps that do not count
        "heldout@1-abcd: bits_per_byte": ([4], [1.8], [4.5]),
    }


def test_checkpoints_are_those_of_the_ledger_and_those_on_disk(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", BROKEN_OFF)
    for step in (5, 9):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step-{step:08d}" / "manifest.json").touch()
    (folder.checkpoints / "step-00000010").mkdir()  # not committed
    newest, told = checkpoints(read_run_files(str(folder.path)))
    assert newest == {"name": "step-00000009", "step": 9, "only_on_disk": True, "on_disk": True}
    assert (told["step"], told["size"], told["stall_seconds"], told["permanent"], told["on_disk"]) == (
        5,
        "10 B",
        0.5,
        True,
        True,
    )
    (folder.checkpoints / "step-00000005" / "manifest.json").unlink()
    assert not checkpoints(read_run_files(str(folder.path)))[1]["on_disk"]


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
    state = page_of(folder)["status"]
    assert state["kind"] == kind
    assert reason in (state["why"], state["label"], "done")


def test_a_run_that_goes_on_is_running_whatever_its_last_end_was(tmp_path: Path) -> None:
    folder = run_of(
        tmp_path,
        "a",
        [start(), *steps(1, 3), event("stop", 3, reason="stopped and saved"), start(3, 9), *steps(4, 5, late=9)],
    )
    ended(folder, 85, 3, "stopped and saved")
    assert page_of(folder, BEGAN + 20)["status"]["kind"] == "running"
    assert page_of(folder, BEGAN + 10_000)["status"]["kind"] == "silent"


def test_the_end_of_an_earlier_session_is_not_the_runs(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 8), event("restore", 5, 100), start(5, 100), *steps(6, 7, 100)])
    ended(folder, 85, 8, "stopped and saved")  # beyond where the run is now, but long ago
    os.utime(folder.exit_file, (BEGAN + 9, BEGAN + 9))
    assert page_of(folder, BEGAN + 120)["status"]["kind"] == "running"
    os.utime(folder.exit_file, (BEGAN + 108, BEGAN + 108))
    assert page_of(folder, BEGAN + 120)["status"]["kind"] == "stopped"


def test_an_end_that_only_the_ledger_tells_of_counts(tmp_path: Path) -> None:
    lines = [
        start(),
        *steps(1, 3),
        event("stop", 3, reason="stopped by a rule"),
        event("save_failed", 3, reason="export"),
    ]
    assert page_of(run_of(tmp_path, "a", lines))["status"]["kind"] == "person"


@pytest.mark.parametrize("lines", [[], [start()]])
def test_a_run_without_a_step_has_a_page_of_its_own(lines: list[Event], tmp_path: Path) -> None:
    run = page_of(run_of(tmp_path, "a", lines))
    assert run["curves"] == {}
    assert run["status"]["label"] == ("starting" if lines else "not started")
    assert (run["headline"]["step"], run["headline"]["loss"]) == (0, None)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / place, name, []) for place, name in (("x", "a"), ("y", "a"), ("y", "b"))]
    assert distinct_names(folders) == ["x/a", "y/a", "b"]
