"""Leases: a reader's word that it is reading a checkpoint, in a file beside the run, so that retention leaves it alone.

A lease ends with its `with` block. One left behind by a reader that died counts no more when its process is gone (on
the same host) or after LEASE_SECONDS (on any).
"""

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minka.plan.atomic import write_json
from minka.plan.errors import UserError

LEASE_SECONDS = 24 * 3600.0
PATIENCE_SECONDS = 2.0  # a checkpoint loses its name for a moment while its leases are looked at


class Lease(NamedTuple):
    """Who reads what, since when (Unix seconds)."""

    checkpoint: str
    host: str
    pid: int
    time: float


def counts(lease: Lease, now: float, host: str, alive: Callable[[int], bool]) -> bool:
    """Whether a lease still holds. One from the future holds too: clocks differ."""
    if now - lease.time > LEASE_SECONDS:
        return False
    return lease.host != host or alive(lease.pid)


def is_leased(run: Path, checkpoint: str) -> bool:
    """Whether a reader holds the checkpoint of this name in the run's folder `run`."""
    host, now = socket.gethostname(), time.time()
    return any(lease.checkpoint == checkpoint and counts(lease, now, host, _alive) for lease in _leases(run))


@contextmanager
def leased(run: Path, checkpoint: Path) -> Iterator[None]:
    """While this lasts the checkpoint is not deleted. Raises UserError when it is gone already.

    Where the run's folder may not be written, there is no lease: the reader takes its chance.
    """
    file = run / "leases" / f"{checkpoint.name}-{uuid.uuid4().hex[:12]}.json"
    try:
        file.parent.mkdir(exist_ok=True)
        lease = Lease(checkpoint.name, socket.gethostname(), os.getpid(), time.time())
        write_json(file, lease._asdict())
    except OSError:
        yield
        return
    try:
        waited = time.monotonic()
        while not checkpoint.is_dir():
            if time.monotonic() - waited > PATIENCE_SECONDS:
                raise UserError(
                    "this checkpoint is gone",
                    where=str(checkpoint),
                    why="the run keeps the newest ones only (checkpoint.keep)",
                    remedy="take a newer one",
                )
            time.sleep(0.05)
        yield
    finally:
        with suppress(OSError):  # a lease that stays counts no more once this process is gone
            file.unlink()


def _leases(run: Path) -> Iterator[Lease]:
    for file in sorted((run / "leases").glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            lease = Lease(str(found["checkpoint"]), str(found["host"]), int(found["pid"]), float(found["time"]))
            if not (math.isfinite(lease.time) and 0 < lease.pid < 2**31):
                raise ValueError("no process, or no time")
        except FileNotFoundError:
            continue  # ended just now
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            # Half written by a reader that died, or damaged: it holds whatever its name says, for a while.
            name = "-".join(file.name.split("-")[:2])
            try:
                lease = Lease(name, "", 0, file.lstat().st_mtime)
            except FileNotFoundError:
                continue
        yield lease


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
