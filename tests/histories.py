"""Histories of a run's checkpoints folder on a simulated disk, through the real code, checked after every event.

Each save writes tensors and a state full of its own number, its version, by which what a restore gives is recognised.
"""

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch

from minka.checkpoint import catalogue as shelf
from minka.checkpoint.commit import step_name
from minka.checkpoint.index import INDEX
from minka.checkpoint.manifest import NAME, STEP_FOLDER
from minka.checkpoint.restore import restore, restore_from
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from saved import ALONE, save
from sim_filesystem import Crash, File, Folder, SimFileSystem, never
from turns import Turns

ROWS = 3


def tensors(mesh: Mesh, version: int) -> dict[str, Piece]:
    """A matrix of three rows cut over the ranks (one of four has none), and a scalar that every rank has."""
    each = -(-ROWS // mesh.ranks)
    first = min(ROWS, each * mesh.rank)
    rows = torch.full((min(ROWS, first + each) - first, 2), float(version))
    scalar = torch.tensor(float(version))
    return {
        "model.w": Piece(rows, (first, 0), (ROWS, 2)),
        "count": Piece(scalar, (), (), mesh.ranks, mesh.rank),
    }


VERSION = re.compile(rb'"version": ([0-9]+)')


class History:
    """What was done, and what must therefore be there. `keep` as in checkpoint.keep."""

    def __init__(self, base: Path, dice: Random, keep: int, *, power: bool, ranks: int = 1) -> None:
        self.fs, self.dice, self.keep, self.power, self.ranks = SimFileSystem(base, dice), dice, keep, power, ranks
        self.base, self.step, self.version = base, 0, 0
        self.attempted: dict[int, set[int]] = {}  # step: versions that may be there
        self.returned: dict[int, tuple[int, bool]] = {}  # step: (version, permanent) of its last good save
        self.sure: int = 0  # the last version whose save had returned and which nobody damaged
        self.leases: dict[str, int] = {}  # checkpoint: version
        self.damaged: set[str] = set()
        self.faulty = False
        vars(shelf)["is_leased"] = lambda run, name: name in self.leases  # the caller restores it

    def save(self, step: int, *, permanent: bool = False) -> str:
        """Save the next version; the error, if there was one."""
        self.version += 1
        version = self.version
        self.attempted.setdefault(step, set()).add(version)
        older = self.returned.pop(step, None)  # from now on it may be one or the other
        self.damaged.discard(step_name(step))

        def one(mesh: Mesh) -> str:
            state, how = {"step": step, "version": version}, {"keep": self.keep, "permanent": permanent}
            try:
                save(self.base, step, tensors(mesh, version), state, mesh, fs=self.fs, **how)  # type: ignore[arg-type]
            except OSError as error:
                return str(error) or "an error without words"
            return ""

        problems = [one(ALONE)] if self.ranks == 1 else Turns(self.ranks, self.dice).run(one)
        assert len(set(map(bool, problems))) == 1, problems  # all ranks hear of it or none
        if problems[0]:
            if older:  # a replacement that failed: the older one counts still, unless the newer one is there
                there = self.there(step)
                self.returned[step] = (version, permanent) if there == version else older
                hidden = f".{step_name(step)}.replaced" in self.fs.root.names  # nothing could be renamed any more
                assert there in (older[0], version) or hidden
            return str(problems[0])
        self.returned[step] = (version, permanent)
        self.attempted[step] = {version}
        self.sure, self.step = version, step
        if not self.faulty:
            assert not [name for name in self.fs.root.names if name.startswith(".")], list(self.fs.root.names)
        self.check()
        return ""

    def restore(self) -> None:
        """As a process that has just begun would; and what it gives must be one of what was saved, and recent."""
        read, passed = tensors(ALONE, -1), []
        state = restore(self.base, read, ALONE, lambda path, reason: passed.append(path.name), fs=self.fs)
        if state is None:
            assert self.sure == 0, f"version {self.sure} had been saved, and there is nothing"
            self.step = 0
            return
        step, version = state["step"], state["version"]
        assert version in self.attempted[step]
        assert version >= self.sure, f"{version} was read, and {self.sure} is newer"
        for name, piece in read.items():
            assert bool((piece.local == version).all()), f"{name} of {version} is torn: {piece.local}"
        assert set(passed) <= self.damaged, f"passed over without damage: {passed}"
        for name in passed:
            self.damaged.discard(name)
            self.returned.pop(int(name[5:]), None)
            self.leases.pop(name, None)  # a reader finds the damage itself
        self.step, self.sure = step, version
        self.returned[step] = self.returned.get(step, (version, False))
        self.check()

    def read_all(self) -> None:
        """Every checkpoint that nobody damaged, not only the newest."""
        for step, (version, _) in self.returned.items():
            if step_name(step) not in self.damaged:
                read = tensors(ALONE, -1)
                assert restore_from(self.base / step_name(step), read, ALONE, fs=self.fs)["version"] == version
                assert all(bool((piece.local == version).all()) for piece in read.values())

    def check(self) -> None:
        """Permanent ones, leased ones and the newest are there, and what is there is what was saved."""
        for name, version in self.leases.items():
            assert name in self.damaged or self.there(int(name[5:])) >= version, f"{name} was leased and is gone"
        newest = sorted(self.returned, key=lambda step: self.returned[step][0])[-self.keep :]
        for step, (version, permanent) in self.returned.items():
            if (permanent or step in newest) and step_name(step) not in self.damaged:
                assert self.there(step) in self.attempted[step], f"{version}, step {step}, is gone"
        self.returned = {step: kept for step, kept in self.returned.items() if step_name(step) in self._names()}

    def check_names(self) -> None:
        """No part stands under a name that means a whole, whatever the process was at when it died."""
        for name, folder in self.fs.root.names.items():
            if STEP_FOLDER.fullmatch(name) or name.endswith((".replaced", ".leaving")):
                assert isinstance(folder, Folder)
                assert sorted(folder.names) == [INDEX, NAME, "rank-00000.json", "rank-00000.safetensors"], name

    def there(self, step: int) -> int:
        """The version of a step's checkpoint; -1 where there is none. Straight from the disk: nothing here can fail."""
        folder = self.fs.root.names.get(step_name(step))
        file = folder.names.get(NAME) if isinstance(folder, Folder) else None
        found = VERSION.search(file.content) if isinstance(file, File) else None
        return int(found[1]) if found else -1

    def damage(self, name: str) -> None:
        """Flip a bit of a shard or the manifest."""
        path = self.base / name
        file = self.dice.choice(self.fs.listdir(path))
        content = self.fs.file(path / file).content
        content[self.dice.randrange(len(content))] ^= 1 << self.dice.randrange(8)
        self.damaged.add(name)
        if self.returned[int(name[5:])][0] >= self.sure:
            whole = [kept[0] for step, kept in self.returned.items() if step_name(step) not in self.damaged]
            self.sure = max(whole, default=0)

    def crashing(self, work: Callable[[], Any], at: int) -> bool:
        """Do `work` with the machine dying at the `at`-th change from now; whether it did."""
        self.fs.crash_at = self.fs.changes + at
        try:
            work()
        except Crash:
            self.fs.reboot(power_lost=self.power)
            return True
        self.fs.crash_at = None
        return False

    def failing(self, work: Callable[[], Any], at: int, *, kind: str, lasting: bool, code: int = errno.EIO) -> Any:
        """Do `work` with the `at`-th change or look from now failing; all those after it too when it is `lasting`."""
        first = at + (self.fs.changes if kind == "change" else self.fs.looks)

        def fails(what: str, number: int) -> OSError | None:
            hit = what == kind and (number >= first if lasting else number == first)
            return OSError(code, "on purpose") if hit else None

        self.fs.fails, self.faulty = fails, True
        try:
            return work()
        finally:
            self.fs.fails, self.faulty = never, False

    def _names(self) -> list[str]:
        return [name for name in self.fs.root.names if STEP_FOLDER.fullmatch(name)]


def random_history(base: Path, seed: int, events: int = 8) -> Mapping[str, int]:
    """Saves, replacements, returns, leases, damage, crashes (in recovery too) and errors; how often each happened."""
    dice = Random(seed)
    ranks = dice.choice([1, 1, 1, 1, 1, 1, 2, 3])
    run = History(base, dice, dice.randint(1, 3), power=dice.random() < 0.6, ranks=ranks)
    done: dict[str, int] = {}
    for _ in range(events):
        event = dice.choices(["save", "again", "crash", "error", "lease", "damage", "restart"], [4, 1, 4, 2, 1, 1, 1])[
            0
        ]
        done[event] = done.get(event, 0) + 1
        step = run.step if event == "again" and run.step else run.step + dice.randint(1, 2)
        permanent = dice.random() < 0.15

        def saving(step: int = step, permanent: bool = permanent) -> str:
            return run.save(step, permanent=permanent)

        if event in ("save", "again"):
            assert saving() == ""
        elif event == "crash":
            step = dice.choice([step, max(1, run.step)])
            if run.crashing(lambda step=step: saving(step), dice.randrange(60)):  # type: ignore[misc]
                while run.crashing(run.restore, dice.randrange(12)):
                    done["crash in recovery"] = done.get("crash in recovery", 0) + 1
                run.restore()
        elif event == "error":
            kind = dice.choice(["change", "look"])
            at, lasting = dice.randrange(40 if kind == "change" else 15), dice.random() < 0.3
            run.failing(saving, at, kind=kind, lasting=lasting, code=dice.choice([errno.EIO, errno.ENOSPC]))
            assert saving() == ""
        elif event == "lease":
            run.leases = {name: run.there(int(name[5:])) for name in run._names() if dice.random() < 0.5}
        elif event == "damage":
            whole = [name for name in run._names() if name not in run.damaged and int(name[5:]) in run.returned]
            if len(whole) > 1:
                run.damage(dice.choice(whole))
                run.restore()
        else:
            run.restore()
    run.restore()
    run.read_all()
    return done
