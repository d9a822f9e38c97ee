"""Saves of a run under way: their events, and what becomes of those that fail."""

from pathlib import Path
from typing import Any

import pytest

from minka.checkpoint import write as saving
from minka.checkpoint.catalogue import checkpoints
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_save_stops_nothing_and_the_last_one_is_tried_again(ranks: int, tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 10}, checkpoint={"every_steps": 4, "keep": 9})
    assert on_ranks(train_failing, ranks, config, [4, 10]) == [ExitStatus.DONE] * ranks
    assert told(config) == [("save_failed", 4), ("save", 8), ("save_failed", 10), ("save", 10)]
    assert [path.name for path in checkpoints(RunFolder.of(config).checkpoints)] == ["step-00000008", "step-00000010"]


def test_a_last_save_that_fails_twice_fails_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 6})
    assert on_ranks(train_failing, 1, config, [6, 6]) == [ExitStatus.FAILED]
    assert told(config) == [("save_failed", 6), ("save_failed", 6)]
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]  # from nothing, since nothing was ever saved


def test_the_ledger_says_what_a_save_cost_and_whether_it_stays(tmp_path: Path) -> None:
    kept = {"every_steps": 5, "keep": 1, "keep_every_steps": 10, "keep_tokens": [40 * 32]}  # passed in step 8
    config = tiny(tmp_path, checkpoint=kept)
    assert on_ranks(train_rank, 2, config) == [ExitStatus.DONE] * 2
    saves = [e for e in read_ledger(RunFolder.of(config).ledger_file) if e["event"] == "save"]
    assert [(e["step"], e["permanent"]) for e in saves] == [(5, False), (8, True), (10, True), (15, False), (20, True)]
    assert all(0 < e["stall_seconds"] <= e["total_seconds"] for e in saves)
    assert all(e["bytes"] > 3 * 4 * 30_000 for e in saves)
    there = [int(path.name[5:]) for path in checkpoints(RunFolder.of(config).checkpoints)]
    assert there == [8, 10, 20]


def train_failing(config: RunConfig, steps: list[int]) -> int:
    """One rank of the run; each of `steps` is once the step of a save whose commit fails."""
    commit, left = saving.commit, list(steps)  # type: ignore[attr-defined]

    def failing(fs: Any, written: Path, final: Path, manifest: bytes) -> None:
        if left and int(final.name[5:]) == left[0]:
            left.pop(0)
            raise OSError(5, "Input/output error")
        commit(fs, written, final, manifest)

    saving.commit = failing  # type: ignore[attr-defined]
    return train_rank(config)


def told(config: RunConfig) -> list[tuple[str, int]]:
    """The saves of the ledger, in their order."""
    events = read_ledger(RunFolder.of(config).ledger_file)
    return [(e["event"], e["step"]) for e in events if e["event"].startswith("save")]
