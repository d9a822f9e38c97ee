"""A folder that is whole or does not exist: built aside, renamed at the end, removed when anything goes wrong."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minka.plan.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Work:
    """The folder being built, and how much of the input is done: what a full disk's message is computed from."""

    folder: Path
    total: int = 0
    done: int = 0

    def advance(self, size: int) -> None:
        """So much more of the input is done."""
        self.done += size


@contextmanager
def building(folder: Path) -> Iterator[Work]:
    """Yields a Work whose folder becomes `folder` when the block ends well; else nothing stays behind.

    When another process made `folder` meanwhile, that one is kept and ours is dropped. The block must turn errors of
    what it reads into UserErrors: an OSError that leaves it is taken to be about writing here. Raises UserError.
    """
    work = Work(folder.parent / f".{folder.name}.preparing-{os.getpid()}-{secrets.token_hex(4)}")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        work.folder.mkdir(parents=True)
        yield work
        _sync(work.folder)
        _publish(work.folder, folder)
        made = []
    except OSError as error:
        written = _size(work.folder)
        shutil.rmtree(work.folder, ignore_errors=True)
        raise _cannot_write(folder, error, work, written) from None
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
        for parent in made:  # nearest first
            _remove_if_empty(parent)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return  # somebody else's is there: whole, since theirs came by a rename too
    _sync_folder(folder.parent)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(folder: Path, error: OSError, work: Work, written: int) -> UserError:
    where = str(folder)
    if error.errno not in FULL:
        return UserError(
            f"the store cannot be written: {error.strerror or error}",
            where=where,
            remedy="give a folder that may be written, with data.store=FOLDER",
        )
    need = ""
    if work.done and work.total:
        need = f"about {_mib(written * work.total // work.done)} are needed, judging by the part that was done; "
    free = _free(folder)
    what = "a file would pass the file-size limit" if error.errno == errno.EFBIG else "the disk ran full"
    return UserError(
        f"{what} while the store was prepared ({error.strerror})",
        where=where,
        why=f"{need}{_mib(written)} had been written, and {free} are free now that they are removed",
        remedy="make room, or give a folder on a larger disk with data.store=FOLDER, or read less with data.max_bytes",
    )


def _free(folder: Path) -> str:
    for parent in folder.parents:
        if parent.exists():
            return _mib(shutil.disk_usage(parent).free)
    return "unknown bytes"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # it never came to be, or somebody else uses it
