"""The few operations that checkpoints need of a file system, so that tests can pass one that fails or dies at any."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from minka.plan.atomic import sync

# Errors that may pass although the file is whole. A read is tried again; a file that still cannot be read is passed
# over without being called damaged.
PASSING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN, errno.EACCES}
)
PAUSES = (0.1, 1.0)  # seconds before the second and the third attempt

Heartbeat = Callable[[], None]  # called for each chunk that is read, hashed or written


class FileSystem:
    """Any mounted file system with atomic renames and a reliable fsync.

    Every call may raise OSError. None follows a symbolic link in the last part of a path.
    """

    def mkdir(self, folder: Path) -> None:
        folder.mkdir()

    def write(self, file: Path, parts: Iterable[memoryview]) -> None:
        """Write a new file. When this returns its content is on the disk; its name is after `sync`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(file, flags, 0o666), "wb", buffering=0) as opened:
            for part in parts:
                while part.nbytes:  # a write may take less than it was given
                    part = part[opened.write(part) :]
            os.fsync(opened.fileno())

    def sync(self, folder: Path) -> None:
        """When this returns, the names in `folder` are on the disk."""
        sync(folder)

    def rename(self, old: Path, new: Path) -> None:
        """Rename atomically within a folder; FileExistsError when `new` exists."""
        if os.path.lexists(new):
            raise FileExistsError(f"{new} exists")
        os.rename(old, new)

    def rmtree(self, folder: Path) -> None:
        """Delete a folder with everything in it, if it exists."""
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)

    def listdir(self, folder: Path) -> list[str]:
        """Names in a folder, sorted; empty when it does not exist."""
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def size(self, file: Path) -> int:
        """Bytes of a regular file; OSError for anything else."""
        return _regular(os.lstat(file), file).st_size

    def read(self, file: Path, offset: int, length: int) -> bytearray:
        """So many bytes, or fewer at the end of the file."""
        for pause in PAUSES:
            try:
                return self._read(file, offset, length)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
            time.sleep(pause)
        return self._read(file, offset, length)

    def _read(self, file: Path, offset: int, length: int) -> bytearray:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
        with os.fdopen(os.open(file, flags), "rb") as opened:
            size = _regular(os.fstat(opened.fileno()), file).st_size
            content = bytearray(max(0, min(length, size - offset)))
            opened.seek(offset)
            if opened.readinto(content) != len(content):
                raise OSError(f"{file} became shorter while it was read")
            return content

    def free_bytes(self, folder: Path) -> int:
        """Bytes that may still be written there."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize


def _regular(found: os.stat_result, file: Path) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{file} is not a regular file")
    return found


LOCAL = FileSystem()
