"""The commit protocol on a disk that dies at any step: never zero whole checkpoints, never a torn one loaded."""

import copy
import errno
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from histories import History, random_history
from minka.checkpoint import catalogue as shelf
from minka.checkpoint.commit import recovery, steps_among

FAST, ALL, CHUNK = 550, 10_000, 3_150


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        vars(shelf), "is_leased", lambda run, name: False
    )  # histories hold leases of their own: put back afterwards
    torch.set_num_threads(1)


def many(base: Path, seeds: range) -> None:
    done: Counter[str] = Counter()
    for seed in seeds:
        try:
            done.update(random_history(base, seed))
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    assert min(done.values()) > len(seeds) / 10, done  # each kind of event, crashes in recovery too
    assert len(done) == 8, done


def test_random_histories_never_lose_or_tear_a_checkpoint(tmp_path: Path) -> None:
    many(tmp_path, range(FAST))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, ALL, CHUNK))
def test_random_histories_never_lose_or_tear_a_checkpoint_up_to_10_000(first: int, tmp_path: Path) -> None:
    many(tmp_path, range(first, min(ALL, first + CHUNK)))


def fixed_history(run: History) -> None:
    """Every transition: a first one, a permanent one, pruning, a replacement, pruning past a lease."""
    run.save(1)
    run.save(2, permanent=True)
    run.save(3)
    run.save(4)
    run.save(4)
    run.leases = {"step-00000003": run.there(3)}
    run.save(5)
    run.leases = {}
    run.save(6)


@pytest.mark.parametrize("luck", ["killed", 1, 2])
def test_a_crash_at_every_step_of_a_history_and_of_its_recovery(luck: str | int, tmp_path: Path) -> None:
    """`luck` decides what a loss of power leaves; a killed process loses nothing."""

    def fresh() -> History:
        return History(tmp_path, Random(f"{luck}"), 2, power=luck != "killed")

    whole = fresh()
    fixed_history(whole)
    assert sorted(whole.fs.root.names) == [f"step-{step:08d}" for step in (2, 4, 5, 6)]
    steps, recoveries = whole.fs.changes, 0
    for at in range(steps):
        run = fresh()
        assert run.crashing(lambda run=run: fixed_history(run), at)  # type: ignore[misc]
        run.check_names()
        for inside in range(50):
            again = copy.deepcopy(run)
            if not again.crashing(again.restore, inside):
                break
            recoveries += 1
            again.restore()
        again.save(7)  # and it goes on
    assert steps > 120
    assert recoveries > steps / 4


@pytest.mark.parametrize("kind", ["change", "look"])
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_at_any_step_fails_one_save_and_costs_no_checkpoint(kind: str, lasting: bool, tmp_path: Path) -> None:
    def errors(at: int, code: int) -> list[str]:
        """Of the save of step 3 or 4 (a replacement, with pruning to be done), with an error at its `at`-th step."""
        run = History(tmp_path, Random(0), 1, power=False)
        run.save(1)
        run.leases = {"step-00000001": 1}
        run.save(3)
        run.leases = {}
        problems = []
        for step in (3, 4):
            problems.append(run.failing(lambda step=step: run.save(step), at, kind=kind, lasting=lasting, code=code))  # type: ignore[misc]
            before = copy.deepcopy(run)
            before.restore()
            assert run.save(step) == ""  # which also asserts that no trace is left
        run.restore()
        return problems

    found = [errors(at, code) for at in range(60) for code in (errno.EIO, errno.ENOSPC)]
    failed = sum(problem != "" for problems in found for problem in problems)
    assert failed > 20
    assert found[-1] == ["", ""], "the error never came: every step was tried"


def test_a_save_that_finds_no_room_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    run = History(tmp_path, Random(0), 2, power=False)
    run.save(1)
    run.fs.room = 10
    assert "No space left on device" in run.save(2)
    assert list(run.fs.root.names) == ["step-00000001"]


def test_what_a_dead_save_has_left_is_cleared_before_room_is_looked_for(tmp_path: Path) -> None:
    """Else a killed save of a nearly full disk would fail every later one."""
    run = History(tmp_path, Random(0), 2, power=False)
    run.save(1)
    assert run.crashing(lambda: run.save(2), 8)
    room, run.fs.room = run.fs.room, 10
    assert run.save(2)
    assert not [name for name in run.fs.root.names if name.startswith(".")]
    run.fs.room = room


def test_mending_gives_whole_ones_their_name_and_clears_the_rest() -> None:
    assert recovery([".step-00000004.replaced", ".step-00000004.saving-1f"]) == (
        {".step-00000004.replaced": "step-00000004"},
        [".step-00000004.saving-1f"],
    )
    assert recovery([".step-00000004.leaving"]) == ({".step-00000004.leaving": "step-00000004"}, [])
    assert recovery([".step-00000004.leaving", ".step-00000004.replaced"]) == (
        {".step-00000004.leaving": "step-00000004"},
        [".step-00000004.replaced"],
    )
    assert recovery(["step-00000004", ".step-00000004.leaving"]) == ({}, [".step-00000004.leaving"])
    assert recovery([".step-00000004.deleting"]) == ({}, [".step-00000004.deleting"])
    assert recovery(["step-00000004", "step-00000004.damaged-1", ".nfs01", ".step-4.leaving", "notes"]) == ({}, [])


def test_a_step_has_one_name() -> None:
    assert steps_among(["step-00000004", "step-0000000004", "step-4", "step-123456789", "step-00000004.damaged-1"]) == [
        4,
        123456789,
    ]
