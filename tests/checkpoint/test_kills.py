"""A real writer on a real disk, killed at any moment: there is always a whole checkpoint, and never a torn one."""

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.catalogue import Catalogue
from minka.checkpoint.commit import HIDDEN, step_name
from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.manifest import NAME
from minka.checkpoint.restore import restore, restore_from
from minka.checkpoint.write import SaveRequest
from minka.parallel.pieces import Piece, piece_of
from ranks import FORKS
from saved import ALONE

KILLS, KEEP, EVERY = 60, 2, 7  # multiples of EVERY stay for ever
LIMIT = 300.0  # seconds, against hangs alone
MOMENTS = (
    "staging",
    "writing",
    "before the manifest",
    "after the manifest, before the rename",
    "between the renames of a replacement",
    "after the rename, the replaced one still there",
    "after the rename, before it is reported",
    "pruning, its name taken",
    "pruning, deleting",
)


def numbers(version: float) -> dict[str, Piece]:
    """12 MB: writing takes long enough to be hit."""
    made = {name: torch.full((1024, 1024), float(version)) for name in ("model.w", "first.w", "second.w")}
    return {name: piece_of(tensor) for name, tensor in made.items()}


class NappingFileSystem(FileSystem):
    """The real disk, where one moment lasts until the kill, which makes a rare one certain."""

    def __init__(self, moment: str, naps: Connection) -> None:
        self.moment, self._naps = moment, naps

    def mkdir(self, folder: Path) -> None:
        self._nap("staging")
        super().mkdir(folder)

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        if file.name == NAME:
            self._nap("before the manifest")
        super().write(file, self._slowly(parts) if file.suffix == ".safetensors" else parts)

    def rename(self, old: Path, new: Path) -> None:
        replacing = (new.parent / f".{new.name}.replaced").exists()
        if ".saving-" in old.name:
            self._nap(MOMENTS[4] if replacing else MOMENTS[3])
        elif old.name.endswith(".replaced"):
            self._nap("after the rename, the replaced one still there")
        elif old.name.endswith(".leaving"):
            self._nap("pruning, its name taken")
        super().rename(old, new)
        if ".saving-" in old.name and not replacing:
            self._nap("after the rename, before it is reported")

    def rmtree(self, folder: Path) -> None:
        if folder.name.endswith(".deleting") and folder.exists():
            self._nap("pruning, deleting")
            for file in folder.iterdir():
                file.unlink()
                self._nap("pruning, deleting")
        super().rmtree(folder)

    def _slowly(self, parts: Iterable[memoryview]) -> Iterator[memoryview]:
        for part in parts:
            half = part.nbytes // 2
            yield part[:half]
            self._nap("writing")
            yield part[half:]

    def _nap(self, moment: str) -> None:
        if self.moment == moment:
            self._naps.send(moment)
            time.sleep(LIMIT)


def write_for_ever(pipe: Connection, naps: Connection, folder: str, first: int, moment: str) -> None:
    """Restore, then save in a loop, every third step twice, saying when a save begins and when it is committed."""
    torch.set_num_threads(1)
    read = numbers(-1)
    state = restore(Path(folder), read, ALONE, lambda path, reason: os._exit(3))
    step = state["step"] if state else 0
    saver = AsyncSaver(Path(folder), ALONE, KEEP, fs=NappingFileSystem(moment, naps))
    for version in itertools.count(first):
        step += version % 3 != 0 or step == 0
        tensors = numbers(version)
        pipe.send(("begun", version, step))
        saver.save(SaveRequest(step, {"step": step, "version": version}, permanent=step % EVERY == 0), tensors)
        saver.wait_for_copy()
        for piece in tensors.values():
            piece.local.fill_(-1)  # the training goes on
        outcome = saver.wait()
        if outcome is None or outcome.error:
            os._exit(4)
        pipe.send(("committed", version, step))


def killed_writer(folder: Path, first: int, moment: str, dice: random.Random) -> list[Any]:
    """All that a writer said before it was killed: at `moment`, or at any time where that is empty."""
    (ours, theirs), (napping, naps) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=write_for_ever, args=(theirs, naps, str(folder), first, moment), daemon=True)
    process.start()
    theirs.close()
    naps.close()
    said = [ours.recv()]
    if moment:
        assert napping.poll(LIMIT), f"never came to: {moment}"
    until = time.monotonic() + (0.0 if moment else dice.uniform(0.0, 0.9))
    while time.monotonic() < until:
        if ours.poll(max(0.0, until - time.monotonic())):
            said.append(ours.recv())
    assert process.is_alive(), f"the writer ended by itself: {process.exitcode}"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with pytest.raises(EOFError):
        while True:
            said.append(ours.recv())
    return said


def moment_of(folder: Path, version: int) -> str:
    """What the process was at when it died, by the names it has left; `version` is the save it had begun last."""
    hidden = {match[2]: name for name in os.listdir(folder) if (match := HIDDEN.fullmatch(name))}
    if "saving" in hidden:
        inside = os.listdir(folder / hidden["saving"])
        if "replaced" in hidden:
            return "between the renames of a replacement"
        if NAME in inside:
            return "after the manifest, before the rename"
        return "before the manifest" if "rank-00000.json" in inside or _full(folder) else "writing"
    if "replaced" in hidden:
        return "after the rename, the replaced one still there"
    if "leaving" in hidden:
        return "pruning, its name taken"
    if "deleting" in hidden:
        return "pruning, deleting"
    newest = max(Catalogue(folder).all(), key=lambda kept: kept.number, default=None)
    if newest is None or f'"version": {version}' not in (folder / step_name(newest.step) / NAME).read_text():
        return "staging"
    return "after the rename, before it is reported"


def _full(folder: Path) -> bool:
    """Whether the shard being written has all its bytes: then only its note, gone already, can have been last."""
    shards = {file.stat().st_size for file in folder.glob(".*.saving-*/*.safetensors")}
    return shards <= {file.stat().st_size for file in folder.glob("step-*/*.safetensors")}


def assert_whole(read: dict[str, Piece], state: dict[str, Any]) -> None:
    for name, piece in read.items():
        assert bool((piece.local == float(state["version"])).all()), f"{name} is torn"


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    dice, hit, kept_for_ever = random.Random(time.time_ns()), Counter[str](), set[int]()
    first, committed = 1, 0
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for kill in range(KILLS):
        missing = [moment for moment in MOMENTS if not hit[moment]]
        napping = dice.choice(missing or MOMENTS) if kill % 2 else ""
        said = killed_writer(folder, first, napping, dice)
        _, version, _ = said[-1]
        moment = moment_of(folder, version) if said[-1][0] == "begun" else "between two saves"
        hit[moment] += 1
        names = [name for name in sorted(os.listdir(folder)) if int(name.split("-")[1][:8]) % EVERY]
        print(f"kill {kill}: {moment}: {', '.join(names)}")  # but the permanent ones, which are many
        for word, number, step in said:
            if word == "committed":
                committed = number
                kept_for_ever |= {step} if step % EVERY == 0 else set()
        read = numbers(-1)
        state = restore(folder, read, ALONE, lambda path, reason: pytest.fail(f"{path} was passed over: {reason}"))
        if committed:
            assert state, "there was a checkpoint, and there is none"
        if state:
            assert_whole(read, state)
            assert committed <= state["version"] <= version
        first = version + 1
    print(dict(hit))
    assert set(MOMENTS) <= set(hit), f"never hit: {set(MOMENTS) - set(hit)}"
    assert len(kept_for_ever) > 3
    for step in kept_for_ever:
        read = numbers(-1)
        assert_whole(read, restore_from(folder / step_name(step), read, ALONE))
