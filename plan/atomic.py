"""Atomic writes: files and folders that appear whole or not at all, and write errors that say what to do."""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minka.plan.errors import UserError
from minka.plan.ledger import finite

REMEDY = "choose a different place (run.folder=..., data.store=...)"
MIB = 2**20


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file in the same folder, sync it, rename it to `path`."""
    temporary = _partial(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:  # not tempfile, whose files only their owner can read
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """`write_text` of one JSON document."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


@contextmanager
def writing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn an OSError of the block into a UserError about writing `path`."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename or path)
        raise _cannot_write(path if named.name.startswith(f".{path.name}.") else named, error, remedy) from error


def check_writable(folder: Path) -> None:
    """Raise an OSError with the name of `folder` where no file can be made in it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from None


@dataclass
class NewFolder:
    path: Path
    done: float = 0.0  # finished fraction of the work, for the message of a full disk


@contextmanager
def atomic_folder(
    folder: Path, *, check_replaceable: Callable[[Path], None] | None = None, remedy: str = REMEDY
) -> Iterator[NewFolder]:
    """Yield a NewFolder that is renamed to `folder` when the block succeeds. Otherwise nothing of it remains.

    Without `check_replaceable`: a `folder` that a different process has published in the meantime is kept. With it,
    `folder` is replaced, unless the function raises UserError; it is called at the start and again before the rename.
    An OSError of the block becomes a UserError about writing here, so the block must translate its own read errors.
    What a killed process of this host has left of an earlier attempt is deleted first.
    """
    new = NewFolder(_partial(folder))
    parents: list[Path] = []
    try:
        if check_replaceable:
            check_replaceable(folder)
        delete_leftovers(folder.parent, folder.name)
        parents = [parent for parent in folder.parents if not parent.exists()]
        new.path.mkdir(parents=True)
        yield new
        for path in (*new.path.rglob("*"), new.path):
            sync(path)
        if check_replaceable:
            check_replaceable(folder)
        _publish(new.path, folder, replace=bool(check_replaceable))
    except OSError as error:
        written = sum(path.stat().st_size for path in new.path.rglob("*") if path.is_file())
        shutil.rmtree(new.path, ignore_errors=True)  # before the free space is measured
        why = f"{written / MIB:,.1f} MiB had been written and are deleted"
        if new.done:
            why = f"about {written / new.done / MIB:,.1f} MiB are needed, judging by the finished part; {why}"
        raise _cannot_write(folder, error, remedy, why if written else "") from error
    finally:
        shutil.rmtree(new.path, ignore_errors=True)
        for parent in parents:  # nearest first; only those that are still empty
            with suppress(OSError):
                parent.rmdir()


def _publish(new: Path, folder: Path, replace: bool) -> None:
    old = new.with_suffix(".old.partial")
    try:
        if replace and folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if not replace and isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return  # published by a different process, which renamed a whole folder, too
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _partial(path: Path) -> Path:
    """A hidden name for what is being written, with its host and process: several hosts may share the disk."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def delete_leftovers(folder: Path, name: str = "") -> None:
    """Delete what processes of this host that have ended left half written in `folder`: of `name`, or of any name."""
    stem = re.escape(name) if name else ".+?"
    pattern = re.compile(rf"\.{stem}\.(?:([\w-]+)\.)?(\d+)(?:\.[0-9a-f]+)?(?:\.old)?\.partial")
    for path in folder.iterdir() if folder.is_dir() else ():
        found = pattern.fullmatch(path.name)  # names of earlier versions have no host
        if found and found[1] in (None, _host()) and (int(found[2]) == os.getpid() or not is_running(int(found[2]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def is_running(pid: int) -> bool:
    """Whether this host has a process of this number, other than one that was killed and that nobody has waited for."""
    with suppress(OSError, IndexError):  # a container without an init process keeps those forever
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # of a different user
    return True


def sync(path: Path) -> None:
    """When this returns, a file's content or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError, remedy: str, why: str = "") -> UserError:
    what, where = f"cannot be written: {os.strerror(error.errno) if error.errno else error}", str(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(what, where=where, why="this place may not be written", remedy=f"allow it, or {remedy}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        missing = next((p for p in reversed(path.absolute().parents) if not p.is_dir()), None)
        if missing is not None:
            made = f"{missing} is a file:" if missing.exists() else f"make the folder {missing}, or"
            return UserError(what, where=where, why=why, remedy=f"{made} {remedy}")
    if error.errno == errno.EFBIG:
        what += " (the file-size limit of this process)"
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = f"{shutil.disk_usage(existing).free / MIB:,.1f} MiB are free on its disk"
    return UserError(what, where=where, why=f"{why}; {free}" if why else free, remedy=f"free some space, or {remedy}")
