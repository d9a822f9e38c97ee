"""Processes that kill themselves at the n-th thing that they do to the disk, as a power cut or a scheduler would."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = frozenset(
    {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree", "shutil.copyfile"}
)


def kill_at(moment: int, folder: Path, log: Path | None = None) -> None:
    """From now on count what this process does to files below `folder`, and kill it just before the `moment`-th.

    Writes by libraries that are not Python's are not seen; what comes before and after is. `log` gets a line for each.
    """
    inside, seen = str(folder.resolve()), [0]
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        name = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else ""
        if name.startswith(inside):
            seen[0] += 1
            if notes is not None:
                os.write(notes, f"{event} {name[len(inside) :]}\n".encode())
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(body: Any, moment: int, folder: Path) -> bool:
    """Run `body` in a fork of this process that is killed at its `moment`-th change of `folder`; whether it was."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            kill_at(moment, folder)
            body()
            status = 0
        finally:
            os._exit(status)
    _, raw = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(raw)
    assert code in (0, -signal.SIGKILL), f"ended with {code}"
    return bool(code)
