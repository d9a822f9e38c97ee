"""While a reader holds a lease its checkpoint stays, whoever comes first; a lease nobody holds keeps nothing."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from minka.checkpoint import reader_lease as lease_module
from minka.checkpoint.catalogue import Catalogue, steps_of
from minka.checkpoint.commit import delete_unless_leased
from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.reader_lease import LEASE_SECONDS, Lease, is_leased, is_valid, leased
from minka.checkpoint.restore import restore_from
from minka.plan.errors import UserError
from ranks import FORKS
from saved import ALONE, save, tensors
from sim_filesystem import Folder, SimFileSystem

NAME = "step-00000001"
LAST = 17  # steps of a pruner, at most


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, tensors(step), {"step": step}, ALONE)
    return tmp_path


def left(run: Path) -> list[int]:
    """Steps that are there when only the newest must be."""
    Catalogue(run / "checkpoints").prune(1)
    return steps_of(run / "checkpoints")


def test_a_lease_holds_its_checkpoint_while_it_lasts_and_no_other(run: Path) -> None:
    with leased(run, run / "checkpoints" / NAME):
        assert is_leased(run, NAME)
        assert not is_leased(run, "step-00000002")
        assert left(run) == [1, 2]
    assert list((run / "leases").iterdir()) == []
    assert left(run) == [2]


def test_a_lease_ends_when_its_reader_fails(run: Path) -> None:
    with pytest.raises(KeyError), leased(run, run / "checkpoints" / NAME):
        raise KeyError
    assert left(run) == [2]


def test_two_readers_hold_one_checkpoint_until_both_are_done(run: Path) -> None:
    with leased(run, run / "checkpoints" / NAME):
        with leased(run, run / "checkpoints" / NAME):
            pass
        assert left(run) == [1, 2]
    assert left(run) == [2]


@pytest.mark.parametrize(
    ("host", "age", "living", "holds"),
    [
        ("here", 0.0, True, True),
        ("here", 0.0, False, False),
        ("there", 0.0, False, True),  # nothing is known of another host's processes
        ("there", LEASE_SECONDS - 1, False, True),
        ("there", LEASE_SECONDS + 1, False, False),
        ("here", LEASE_SECONDS + 1, True, False),
        ("there", -3600.0, False, True),  # its clock is ahead
    ],
)
def test_a_lease_counts_by_its_process_here_and_by_its_age_anywhere(
    host: str, age: float, living: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(checkpoint=NAME, host=host, pid=1, time=1e9 - age)
    monkeypatch.setattr(lease_module, "is_running", lambda pid: living)
    assert is_valid(lease, 1e9, "here") == holds


def hold_for_ever(run: str) -> None:
    with leased(Path(run), Path(run) / "checkpoints" / NAME):
        signal.pause()


def test_a_reader_that_was_killed_holds_nothing(run: Path) -> None:
    reader = FORKS.Process(target=hold_for_ever, args=(str(run),), daemon=True)
    reader.start()
    while not is_leased(run, NAME):
        time.sleep(0.01)
    assert left(run) == [1, 2]
    reader.kill()
    reader.join()
    assert len(list((run / "leases").iterdir())) == 1
    assert left(run) == [2]


def valid(**changed: Any) -> str:
    lease = {"checkpoint": NAME, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps({**lease, **changed})


WRITTEN: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "half of it": lambda: valid()[:20],
    "a list": lambda: "[]",
    "no process": lambda: valid(pid=None),
    "process 0": lambda: valid(pid=0),
    "every process": lambda: valid(pid=-1),
    "process 2^70": lambda: valid(pid=2**70),
    "no number for a time": lambda: valid(time=float("nan")),
    "no end of time": lambda: valid(time=float("inf")),
    "a time of 10,000 digits": lambda: valid().replace('"time": ', '"time": ' + "9" * 10_000),
    "nested deep": lambda: "[" * 100_000,
}


@pytest.mark.parametrize("content", WRITTEN)
def test_a_lease_that_cannot_be_read_holds_by_its_name_for_a_day(content: str, run: Path) -> None:
    """It may have been cut off while its reader goes on."""
    file = run / "leases" / f"{NAME}-0123456789ab.json"
    file.parent.mkdir()
    file.write_text(WRITTEN[content]())
    assert left(run) == [1, 2]
    assert not is_leased(run, "step-00000002")
    old = time.time() - LEASE_SECONDS - 60
    os.utime(file, (old, old))
    assert left(run) == [2]


def test_where_no_lease_can_be_written_a_reader_takes_its_chance(run: Path) -> None:
    (run / "leases").write_text("a file, where the folder should be")
    with leased(run, run / "checkpoints" / NAME):
        assert restore_from(run / "checkpoints" / NAME, tensors(), ALONE) == {"step": 1}
    assert left(run) == [2]


def test_a_reader_that_comes_too_late_gets_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.1)
    assert left(run) == [2]
    with pytest.raises(UserError, match="deleted"), leased(run, run / "checkpoints" / NAME):
        pytest.fail("there is nothing to read")
    assert list((run / "leases").iterdir()) == []


def reader_and_pruner(folder: Path, write: int, look: int) -> tuple[bool, bool]:
    """The lease is written before the pruner's `write`-th step, and the reader looks from its `look`-th on.

    Whether it saw the checkpoint, and whether that was deleted.
    """
    fs, held, seen, step = SimFileSystem(folder, Random(0)), False, False, 0
    save(folder, 1, tensors(), {}, ALONE, fs=fs)

    def tick(kind: str = "", number: int = 0) -> None:
        nonlocal held, seen, step
        step += 1
        held = held or step == write
        seen = seen or (held and step >= look and NAME in fs.root.names)

    def taken() -> bool:
        tick()
        return held

    fs.fails = tick  # which fails nothing
    gone = delete_unless_leased(fs, folder / NAME, taken)
    assert step < LAST, "later orders would have to be tried too"
    found = fs.root.names.get(NAME)
    assert gone == (found is None)
    assert gone or (isinstance(found, Folder) and len(found.names) == 4)
    return seen, gone


def test_reader_and_pruner_in_every_order_never_delete_what_is_read(tmp_path: Path) -> None:
    outcomes = set()
    for write in range(1, LAST + 1):
        for look in range(write, LAST + 1):
            seen, gone = reader_and_pruner(tmp_path, write, look)
            assert not (seen and gone), f"deleted while it was read: {write}, {look}"
            outcomes.add((seen, gone))
    assert outcomes == {(True, False), (False, False), (False, True)}


class SteppingFileSystem(FileSystem):
    """Calls `tick` before each step of pruning."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def rename(self, old: Path, new: Path) -> None:
        self.tick()
        super().rename(old, new)

    def sync(self, folder: Path) -> None:
        self.tick()
        super().sync(folder)

    def rmtree(self, folder: Path) -> None:
        self.tick()
        super().rmtree(folder)


@pytest.mark.parametrize("at", range(9))
def test_a_real_reader_that_begins_at_any_step_of_pruning_reads_or_gets_an_error(
    at: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, steps, pruned = run / "checkpoints" / NAME, [], 0, threading.Event()
    # A slow pruner costs the reader no patience: its clock begins when the pruning has ended.
    monkeypatch.setattr(lease_module, "PATIENCE_SECONDS", 0.2)
    now = SimpleNamespace(**vars(time) | {"monotonic": lambda: time.monotonic() if pruned.is_set() else 0.0})
    monkeypatch.setattr(lease_module, "time", now)

    def reader() -> None:
        try:
            with leased(run, path):
                time.sleep(0.1)
                read.append(restore_from(path, tensors(), ALONE))
        except UserError as error:
            read.append(error.what)

    thread = threading.Thread(target=reader)

    def tick() -> None:
        nonlocal steps
        if steps == at:
            thread.start()
            time.sleep(0.02)
        steps += 1

    Catalogue(run / "checkpoints", SteppingFileSystem(tick)).prune(1)
    pruned.set()
    if not thread.ident:
        thread.start()
    thread.join()
    assert read in ([{"step": 1}], ["this checkpoint has been deleted"])
    assert path.exists() == (read == [{"step": 1}])
