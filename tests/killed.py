"""Processes that kill themselves at the n-th thing that they do to the disk, as a power cut or a scheduler would."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.copyfile"})
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_at(moment: int, folder: Path, log: Path) -> None:
    """From now on note in `log` what this process does to names below `folder`; kill it just before the `moment`-th.

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
            if os.pread(notes, 2**20, 0).count(b"\n") == moment:
                if top := os.environ.get("MINKA_TEST_TOP"):
                    os.kill(int(top), signal.SIGKILL)
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_command() -> None:
    """`kill_at` in each process of a command, by its environment; called when its Python starts."""
    os.environ.setdefault("MINKA_TEST_TOP", str(os.getpid()))
    moment, folder, log = os.environ["MINKA_TEST_KILL"].split(os.pathsep)
    kill_at(int(moment), Path(folder), Path(log))


def forked(body: Callable[[], None], moment: int, folder: Path) -> bool:
    """Run `body` in a fork of this process that is killed at its `moment`-th change of `folder`; whether it was."""
    log = folder.parent / f"{folder.name}-{moment}.log"
    pid = os.fork()
    if not pid:
        status = 1
        try:
            kill_at(moment, folder, log)
            body()
            status = 0
        finally:
            os._exit(status)
    _, raw = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(raw)
    assert code in (0, -signal.SIGKILL), f"ended with {code}"
    return bool(code)
