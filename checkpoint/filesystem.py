"""The few things a checkpoint asks of a file system, so that tests can hand in one that dies at any of them."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

# What a file system or a busy host may say of a file that is whole. It is asked again, and if that does not help
# the file is not read; but it is not called damaged.
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN, errno.EACCES}
)
PAUSES = (0.1, 1.0)  # seconds before the second and the third time


class Disk(Protocol):
    """Every call may raise OSError. Nothing follows a symbolic link in the last part of a path."""

    def make(self, folder: Path) -> None:
        """A new, empty folder."""

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        """A new file; its content is on the disk when this returns (its name is not, before `sync`)."""

    def sync(self, folder: Path) -> None:
        """The names in `folder` are on the disk when this returns."""

    def rename(self, old: Path, new: Path) -> None:
        """One step, in the same folder; FileExistsError when `new` is there."""

    def remove(self, folder: Path) -> None:
        """A folder and all that is in it; nothing when it is not there."""

    def forget(self, file: Path) -> None:
        """Delete one file."""

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted; empty when it is not there."""

    def size(self, file: Path) -> int:
        """Bytes of a regular file; OSError for anything else."""

    def read(self, file: Path, offset: int, length: int) -> bytearray:
        """So many bytes, or fewer at the end of the file."""

    def free(self, folder: Path) -> int:
        """Bytes that may still be written there."""


class LocalDisk:
    """The real one: any file system with atomic renames and an honest fsync. See Disk."""

    def make(self, folder: Path) -> None:
        """See Disk."""
        folder.mkdir()

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        """See Disk."""
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for part in parts:
                while part.nbytes:  # a write may take less than it was given
                    part = part[os.write(handle, part) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def sync(self, folder: Path) -> None:
        """See Disk."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """See Disk."""
        if os.path.lexists(new):
            raise FileExistsError(f"{new} exists")
        os.rename(old, new)

    def remove(self, folder: Path) -> None:
        """See Disk."""
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)

    def forget(self, file: Path) -> None:
        """See Disk."""
        file.unlink()

    def names(self, folder: Path) -> list[str]:
        """See Disk."""
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def size(self, file: Path) -> int:
        """See Disk."""
        found = os.lstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{file} is no regular file")
        return found.st_size

    def read(self, file: Path, offset: int, length: int) -> bytearray:
        """See Disk."""
        for pause in PAUSES:
            try:
                return self._read(file, offset, length)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
            time.sleep(pause)
        return self._read(file, offset, length)

    def _read(self, file: Path, offset: int, length: int) -> bytearray:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{file} is no regular file")
            room = bytearray(max(0, min(length, found.st_size - offset)))
            view, filled = memoryview(room), 0
            while filled < len(room):
                got = os.preadv(handle, [view[filled:]], offset + filled)
                if not got:
                    raise OSError(f"{file} became shorter while it was read")
                filled += got
            return room
        finally:
            os.close(handle)

    def free(self, folder: Path) -> int:
        """See Disk."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize


LOCAL = LocalDisk()
