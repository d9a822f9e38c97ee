"""A disk in memory that dies and fails when it is told to, and forgets what a real one may forget.

A file's content is sure once `write` has returned; before, a loss of power leaves all, some, none or garbage of it. The
names of each folder are a journal of its own: of what was done since its last `sync`, some beginning survives. A killed
process loses nothing that was done; a loss of power loses what was not synced.
"""

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from minka.checkpoint.filesystem import FileSystem

NO_SPACE = 10**15


class Crash(BaseException):
    """The process is gone. Nothing catches it, and the disk takes nothing more until `reboot`."""


def never(kind: str, number: int) -> OSError | None:
    """No error."""
    return None


class File:
    """Some bytes; `sure` once they are on the disk."""

    def __init__(self) -> None:
        self.content, self.sure = bytearray(), False


class Folder:
    """Names now, on the disk for sure, and after each change since."""

    def __init__(self) -> None:
        self.names: dict[str, File | Folder] = {}
        self.sure: dict[str, File | Folder] = {}
        self.since: list[dict[str, File | Folder]] = []

    def changed(self) -> None:
        self.since.append(dict(self.names))


class SimFileSystem(FileSystem):
    """See the module, and checkpoint/filesystem.py for the calls. `base`, the checkpoints folder, always exists.

    Every change is a step, and so is every look. Set `crash_at` (of the changes), or `fails`, which is asked with
    ("change" | "look", its number) for an error.
    """

    def __init__(self, base: Path, dice: Random) -> None:
        self.base, self.dice = base, dice
        self.root = Folder()
        self.changes, self.looks = 0, 0
        self.crash_at: int | None = None
        self.fails: Callable[[str, int], OSError | None] = never
        self.dead = False
        self.room = NO_SPACE

    def reboot(self, *, power_lost: bool) -> None:
        """After a crash, or out of the blue."""
        self.dead, self.crash_at = False, None
        if power_lost:
            self._forget(self.root)

    def mkdir(self, folder: Path) -> None:
        self._change()
        parent = self._folder(folder.parent)
        if folder.name in parent.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(folder))
        parent.names[folder.name] = Folder()
        parent.changed()

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        self._change()
        parent = self._folder(file.parent)
        if file.name in parent.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(file))
        new = parent.names[file.name] = File()
        parent.changed()
        for part in parts:
            half = len(part) // 2
            for piece in (part[:half], part[half:]):
                self._change()
                new.content += piece
        self._change()
        new.sure = True

    def sync(self, folder: Path) -> None:
        self._change()
        there = self._folder(folder)
        there.sure, there.since = dict(there.names), []

    def rename(self, old: Path, new: Path) -> None:
        self._change()
        assert old.parent == new.parent
        parent = self._folder(old.parent)
        if new.name in parent.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(new))
        if old.name not in parent.names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(old))
        parent.names[new.name] = parent.names.pop(old.name)
        parent.changed()

    def rmtree(self, folder: Path) -> None:
        parent = self._folder(folder.parent)
        found = parent.names.get(folder.name)
        if found is None:
            return
        if isinstance(found, Folder):
            inside = sorted(found.names)
            self.dice.shuffle(inside)
            for name in inside:
                self._change()
                del found.names[name]
                found.changed()
        self._change()
        del parent.names[folder.name]
        parent.changed()

    def listdir(self, folder: Path) -> list[str]:
        self._look()
        try:
            return sorted(self._folder(folder).names)
        except OSError:
            return []

    def size(self, file: Path) -> int:
        self._look()
        return len(self.file(file).content)

    def read(self, file: Path, offset: int, length: int) -> bytearray:
        self._look()
        return self.file(file).content[offset : offset + length]

    def free_bytes(self, folder: Path) -> int:
        self._look()
        return self.room

    def file(self, path: Path) -> File:
        """A file itself, for a test that damages it."""
        found = self._folder(path.parent).names.get(path.name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        if isinstance(found, Folder):
            raise OSError(errno.EISDIR, "Is a directory", str(path))
        return found

    def _folder(self, path: Path) -> Folder:
        if path == self.base:
            return self.root
        found = self.root.names.get(path.name) if path.parent == self.base else None
        if not isinstance(found, Folder):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return found

    def _change(self) -> None:
        if self.dead or self.changes == self.crash_at:
            self.dead = True
            raise Crash(self.changes)
        self._step("change", self.changes)
        self.changes += 1

    def _look(self) -> None:
        if self.dead:
            raise Crash(self.changes)
        self._step("look", self.looks)
        self.looks += 1

    def _step(self, kind: str, number: int) -> None:
        error = self.fails(kind, number)
        if error is not None:
            self.changes, self.looks = self.changes + (kind == "change"), self.looks + (kind == "look")
            raise error

    def _forget(self, folder: Folder) -> None:
        states = [folder.sure, *folder.since]
        folder.names = dict(self.dice.choice(states))
        folder.sure, folder.since = dict(folder.names), []
        for found in folder.names.values():
            if isinstance(found, Folder):
                self._forget(found)
            elif not found.sure:
                size = len(found.content)
                kept = self.dice.choice([size, self.dice.randrange(size + 1), 0])
                found.content = found.content[:kept]
                if self.dice.random() < 0.5:
                    found.content += self.dice.randbytes(size - kept)
                found.sure = True
