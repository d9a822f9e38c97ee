"""Saves beside the training: one at a time, of the tensors as they were, whatever goes wrong."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.benchmarks.checkpoints import memory
from minka.checkpoint import async_saver
from minka.checkpoint.async_saver import AsyncSaver, Outcome
from minka.checkpoint.catalogue import Catalogue, steps_of
from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.restore import restore
from minka.checkpoint.shard_file import StagingBuffer
from minka.checkpoint.write import SaveRequest
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.layout import Layout
from ranks import on_ranks
from saved import ALONE, silent, tensors

TAKES = 0.3  # seconds, where something is made slow


class GatedFileSystem(FileSystem):
    """Writes nothing until it is let; raises what it is given to raise."""

    def __init__(self) -> None:
        self.open, self.writing = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        self.writing.set()
        self.open.wait()
        if self.error:
            raise self.error
        super().write(file, parts)


class Clock:
    """The saver's clock: it stands still but where a test moves it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(async_saver, "time", made)
    return made


def slow_copies(patch: pytest.MonkeyPatch, clock: Clock, begin: threading.Event) -> None:
    """A copy waits for `begin`, and takes TAKES."""
    take = StagingBuffer.copy_in

    def slow(self: StagingBuffer, *arguments: Any) -> None:
        begin.wait()
        clock.now += TAKES
        take(self, *arguments)

    patch.setattr(StagingBuffer, "copy_in", slow)


def at_each_look(patch: pytest.MonkeyPatch, event: threading.Event, looked: Callable[[], object]) -> None:
    """Call `looked` before each wait for the event."""
    wait = event.wait
    patch.setattr(event, "wait", lambda *timeout: (looked(), wait(*timeout))[1])


def test_what_changes_after_the_copy_is_not_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = threading.Event()
    slow_copies(monkeypatch, Clock(), begin)
    fs, training = GatedFileSystem(), tensors(1)
    saver = AsyncSaver(tmp_path, ALONE, 2, fs=fs)
    fs.open.clear()
    saver.save(SaveRequest(1, {"step": 1}), training)
    assert saver._save is not None
    at_each_look(monkeypatch, saver._save.copied, begin.set)
    saver.wait_for_copy()
    for piece in training.values():
        piece.local.zero_()
    fs.open.set()
    outcome = saver.wait()
    assert outcome is not None
    assert not outcome.error
    read = tensors(9)
    assert restore(tmp_path, read, ALONE, silent) == {"step": 1}
    for name, piece in tensors(1).items():
        assert torch.equal(read[name].local, piece.local), name


@pytest.mark.parametrize("between", [0.0, 2 * TAKES])
def test_stall_is_what_the_training_waited_and_no_more(
    between: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    begin, saver = threading.Event(), AsyncSaver(tmp_path, ALONE, 2)
    slow_copies(monkeypatch, clock, begin)
    saver.save(SaveRequest(1, {}), tensors())
    save = saver._save
    assert save is not None
    if between:  # a forward and backward pass, within which the copy ends
        begin.set()
        save.ended.wait()
        clock.now += between
    else:
        at_each_look(monkeypatch, save.copied, begin.set)  # once the training waits
    saver.wait_for_copy()
    save.ended.wait()
    outcome = saver.poll()
    assert outcome is not None
    assert (outcome.stall_seconds, outcome.total_seconds) == (0.0 if between else TAKES, TAKES)


def test_a_synchronous_save_stalls_for_all_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    begin = threading.Event()
    begin.set()
    slow_copies(monkeypatch, clock, begin)
    saver = AsyncSaver(tmp_path, ALONE, 2, asynchronous=False)
    saver.save(SaveRequest(1, {}), tensors())
    outcome = saver.poll()
    assert outcome is not None
    assert (outcome.stall_seconds, outcome.total_seconds) == (TAKES, TAKES)


def test_one_save_at_a_time_and_its_outcome_is_given_once(tmp_path: Path) -> None:
    fs = GatedFileSystem()
    saver = AsyncSaver(tmp_path, ALONE, 2, fs=fs)
    fs.open.clear()
    saver.save(SaveRequest(1, {}), tensors())
    saver.wait_for_copy()
    assert saver.poll() is None
    with pytest.raises(AssertionError):
        saver.save(SaveRequest(2, {}), tensors())
    fs.open.set()
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.path == tmp_path / "step-00000001"
    assert saver.wait() is None
    assert saver.poll() is None
    saver.save(SaveRequest(2, {}), tensors())
    assert saver.wait() is not None
    assert steps_of(tmp_path) == [1, 2]


def test_the_buffer_is_made_once_and_anew_for_other_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = StagingBuffer.__init__

    def noted(self: StagingBuffer, pieces: Any, *, pinned: bool) -> None:
        made.append(len(pieces))
        make(self, pieces, pinned=pinned)

    monkeypatch.setattr(StagingBuffer, "__init__", noted)
    saver = AsyncSaver(tmp_path, ALONE, 9)
    more = tensors() | {"more": piece_of(torch.zeros(3))}
    for step, given in enumerate((tensors(), tensors(1), more, more), start=1):
        saver.save(SaveRequest(step, {}), given)
        assert saver.wait() is not None
    assert made == [3, 4]
    assert torch.equal(dict(restored(tmp_path, more))["more"], torch.zeros(3))


def restored(folder: Path, like: dict[str, Piece]) -> list[tuple[str, torch.Tensor]]:
    read = {name: piece._replace(local=torch.full_like(piece.local, -1)) for name, piece in like.items()}
    restore(folder, read, ALONE, silent)
    return [(name, piece.local) for name, piece in read.items()]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a bug"), MemoryError("no memory")])
def test_a_save_that_fails_raises_nothing_says_why_and_leaves_nothing(
    error: Exception, asynchronous: bool, tmp_path: Path
) -> None:
    fs = GatedFileSystem()
    saver = AsyncSaver(tmp_path, ALONE, 2, asynchronous=asynchronous, fs=fs)
    outcomes = []
    for step, problem in ((1, None), (2, error), (3, None)):
        fs.error = problem
        saver.save(SaveRequest(step, {"step": step}), tensors(step))
        saver.wait_for_copy()
        outcomes.append(saver.wait())
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    said = [outcome.error for outcome in outcomes if outcome]
    assert said[0] == said[2] == ""
    assert str(error.args[-1]) in said[1]
    assert steps_of(tmp_path) == [1, 3]


def test_no_memory_for_the_buffer_fails_the_save_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StagingBuffer, pieces: Any, *, pinned: bool) -> None:
        raise MemoryError("no memory")

    saver = AsyncSaver(tmp_path, ALONE, 2)
    with monkeypatch.context() as patch:
        patch.setattr(StagingBuffer, "__init__", refuse)
        saver.save(SaveRequest(1, {}), tensors())
        saver.wait_for_copy()
        outcome = saver.wait()
    assert outcome is not None
    assert "no memory" in outcome.error
    assert not list(tmp_path.iterdir())
    saver.save(SaveRequest(2, {}), tensors())
    second = saver.wait()
    assert second is not None
    assert not second.error


def test_what_goes_wrong_while_pruning_does_not_make_a_save_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> list[Path]:
        raise ValueError("a bug")

    monkeypatch.setattr(Catalogue, "prune", broken)
    saver = AsyncSaver(tmp_path, ALONE, 1)
    saver.save(SaveRequest(1, {}), tensors())
    outcome = saver.wait()
    assert outcome is not None
    assert not outcome.error
    assert steps_of(tmp_path) == [1]


def test_a_wait_has_a_heartbeat_while_the_save_gets_on_and_none_while_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the supervisor would wait for ever for a disk that does not answer."""
    monkeypatch.setattr(async_saver, "POLL_SECONDS", 0.001)
    fs, beats = GatedFileSystem(), []
    saver = AsyncSaver(tmp_path, ALONE, 2, fs=fs)
    fs.open.clear()
    saver.save(SaveRequest(1, {}), tensors())
    saver.wait_for_copy()
    save = saver._save
    assert save is not None
    while not (fs.writing.is_set() and save.progress):  # the hash of the only chunk needs no disk
        time.sleep(0.01)
    looks = iter(range(20))
    at_each_look(monkeypatch, save.ended, lambda: fs.open.set() if next(looks, None) is None else None)
    assert saver.wait(lambda: beats.append(fs.open.is_set())) is not None
    assert all(beats), "a beat while nothing was written"


def test_a_save_keeps_one_copy_of_the_state_and_the_next_adds_none() -> None:
    """In a process of its own: its most memory over three saves, beyond what it had, as a share of the state."""
    size = 96 * 2**20
    assert 1.0 <= memory(size, saves=3) <= 1.05 + 24 * 2**20 / size


def fail_on_second_rank(folder: str, how: str, asynchronous: bool) -> list[str]:
    """Three saves of which the second fails on rank 1 alone."""
    fs = GatedFileSystem()
    with start_mesh(Layout()) as mesh:
        saver = AsyncSaver(Path(folder), mesh, 5, asynchronous=asynchronous, fs=fs)
        said, make, largest = [], StagingBuffer.__init__, 2**8

        def refuse(self: StagingBuffer, pieces: Any, *, pinned: bool) -> None:
            raise MemoryError("no memory")

        for step in (1, 2, 3):
            bad = mesh.rank == 1 and step == 2
            fs.error = OSError(28, "No space left") if bad and how == "disk" else None
            StagingBuffer.__init__ = refuse if bad and how == "memory" else make  # type: ignore[method-assign]
            rows = Piece(torch.full((2 + step % 2, largest), float(step)), (3 * mesh.rank, 0), (6, largest))
            saver.save(SaveRequest(step, {"step": step}), {"model.w": rows})
            saver.wait_for_copy()
            outcome: Outcome | None = saver.wait()
            assert outcome is not None
            said.append(outcome.error)
            mesh.barrier()  # rank 0 clears away what failed
            hidden = [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]
            mesh.barrier()
            assert not hidden, hidden
        return said


@pytest.mark.parametrize("how", ["disk", "memory"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_fails_on_one_rank_fails_on_all_by_name_and_leaves_nothing(
    how: str, asynchronous: bool, tmp_path: Path
) -> None:
    first, second = on_ranks(fail_on_second_rank, 2, str(tmp_path), how, asynchronous)
    assert [bool(said) for said in first] == [bool(said) for said in second] == [False, True, False]
    word = "No space left" if how == "disk" else "no memory"
    assert word in second[1]
    assert first[1].startswith("rank 1: ")
    assert word in first[1]  # rank 0 keeps the ledger
    assert steps_of(tmp_path) == [1, 3]
