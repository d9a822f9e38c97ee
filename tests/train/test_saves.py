"""Saves of a run under way: their events, and what becomes of those that fail."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from minka.checkpoint import write as saving
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.manifest import read_header
from minka.data.prepare import open_or_prepare
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.plan.store_files import sha256_of
from minka.train import worker
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


def test_a_store_that_goes_while_a_run_trains_costs_it_no_save(tmp_path: Path) -> None:
    """Its disk is unmounted, say. The tokens that a rank has mapped stay."""
    config = tiny(tmp_path, run={"max_steps": 6}, checkpoint={"every_steps": 2, "keep": 9})
    assert on_ranks(train_without_store, 1, config) == [ExitStatus.DONE]
    assert [event for event in told(config) if event[0] == "save"] == [("save", 2), ("save", 4), ("save", 6)]
    states = [read_header(path).state for path in checkpoints(RunFolder.of(config).checkpoints)]
    assert {state["data_sha256"] for state in states} == {sha256_of(tmp_path / "gone" / "manifest.json")}


def test_ranks_with_different_stores_do_not_train_together(tmp_path: Path) -> None:
    """A store on a local disk of each host, of which one is older."""
    config = tiny(tmp_path, run={"max_steps": 6})
    open_or_prepare(config, tmp_path)
    shutil.copytree(tmp_path / "store", tmp_path / "older")
    with (tmp_path / "older" / "manifest.json").open("a") as manifest:
        manifest.write(" ")
    first, second = on_ranks(train_with_own_store, 2, config)
    assert "the host of rank 1, this is not the store of the first rank" in second
    assert "DONE" not in first
    assert told(config) == []


def train_without_store(config: RunConfig) -> int:
    """One rank of the run, whose store is moved away once it trains."""
    right = worker.train  # type: ignore[attr-defined]

    def train(run: Any, state: Any) -> Any:
        store = Path(config.data.store)
        store.rename(store.with_name("gone"))
        return right(run, state)

    worker.train = train  # type: ignore[attr-defined]
    return train_rank(config)


def train_with_own_store(config: RunConfig) -> str:
    """One rank of the run, which finds another store than the first rank."""
    if os.environ["RANK"] == "1":
        worker.store_folder = lambda *_: Path(config.data.store).with_name("older")  # type: ignore[attr-defined]
    try:
        return ExitStatus(train_rank(config)).name
    except (UserError, SystemExit) as error:
        return str(error)


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
