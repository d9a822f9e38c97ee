"""Processes that are killed, or find the disk full, at the n-th thing that they do to it."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minka.plan.errors import UserError

CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.copyfile"})
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_at(moment: int, folder: Path, log: Path, *, full: bool = False) -> None:
    """From now on note in `log` what this process does to names below `folder`; kill it just before the `moment`-th.

    `full`: instead, the disk is full from then on: no file or folder can be made, while renames and deletions succeed.
    Several processes may share a log: their notes are counted together. What libraries write that are not Python's is
    not seen; what comes before and after it is. MINKA_TEST_TOP is a process that is killed first.
    """
    inside = str(folder.resolve())
    notes = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES and not (event == "open" and (arguments[2] or 0) & WRITES):
            return
        path = arguments[0]
        name = "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
        if name == inside or name.startswith(f"{inside}/"):
            os.write(notes, f"{event} {name[len(inside) :] or '/'}\n".encode())
            count = os.pread(notes, 2**20, 0).count(b"\n")
            if full and count >= moment and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            if count == moment and not full:
                if top := int(os.environ.get("MINKA_TEST_TOP", "0")):
                    forker = os.getpgid(top) != os.getpgrp()  # and its ranks have a group of their own
                    os.kill(top, signal.SIGKILL)
                    if forker:
                        os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_command() -> None:
    """`kill_at` in each process of a command, by its environment; called when its Python starts."""
    os.environ.setdefault("MINKA_TEST_TOP", str(os.getpid()))
    moment, folder, log = os.environ["MINKA_TEST_KILL"].split(os.pathsep)
    kill_at(int(moment), Path(folder), Path(log))


def forked(body: Callable[[], None], moment: int, folder: Path, *, full: bool = False) -> bool:
    """Run `body` in a fork of this process that is killed at its `moment`-th change of `folder`; whether it was.

    `full`: see kill_at; whether it could not write.
    """
    log = folder.parent / f"{folder.name}-{moment}.log"
    pid = os.fork()
    if not pid:
        status = 1
        try:
            kill_at(moment, folder, log, full=full)
            body()
            status = 0
        except UserError as error:
            status = 3 if full and os.strerror(errno.ENOSPC) in str(error) else 1
        finally:
            os._exit(status)
    _, raw = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(raw)
    assert code in (0, 3 if full else -signal.SIGKILL), f"ended with {code}"
    return bool(code)
