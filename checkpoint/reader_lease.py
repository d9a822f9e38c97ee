"""Leases: a reader's file in the run's folder that says which checkpoint it reads, so that retention keeps it.

A lease ends with its `with` block. One that a killed reader left stops counting when its process is gone (on the same
host), or after LEASE_SECONDS (on any host).
"""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from minka.plan.atomic import is_running, write_json
from minka.plan.errors import UserError

LEASE_SECONDS = 24 * 3600.0
PATIENCE_SECONDS = 2.0  # a checkpoint loses its name for a moment while its leases are read


class Lease(BaseModel, frozen=True, strict=True, allow_inf_nan=False):
    """Who reads what, since when (Unix seconds)."""

    checkpoint: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    time: float


def is_valid(lease: Lease, now: float, host: str) -> bool:
    """Whether a lease still holds. One from the future does too: clocks differ."""
    return now - lease.time <= LEASE_SECONDS and (lease.host != host or is_running(lease.pid))


def is_leased(run: Path, checkpoint: str) -> bool:
    """Whether a reader holds the checkpoint of this name in the run's folder `run`."""
    host, now = socket.gethostname(), time.time()
    return any(lease.checkpoint == checkpoint and is_valid(lease, now, host) for lease in _leases(run))


@contextmanager
def leased(run: Path, checkpoint: Path) -> Iterator[None]:
    """Within this context the checkpoint is not deleted. Raises UserError when it has been deleted already.

    Where the run's folder cannot be written, there is no lease, and the checkpoint may be deleted while it is read.
    """
    file = run / "leases" / f"{checkpoint.name}-{uuid.uuid4().hex[:12]}.json"
    try:
        file.parent.mkdir(exist_ok=True)
        lease = Lease(checkpoint=checkpoint.name, host=socket.gethostname(), pid=os.getpid(), time=time.time())
        write_json(file, lease.model_dump())
    except OSError:
        yield
        return
    try:
        waited = time.monotonic()
        while not checkpoint.is_dir():
            if time.monotonic() - waited > PATIENCE_SECONDS:
                remedy = "take a newer one; the run keeps only the newest ones (checkpoint.keep)"
                raise UserError("this checkpoint has been deleted", where=str(checkpoint), remedy=remedy)
            time.sleep(0.05)
        yield
    finally:
        with suppress(OSError):  # a lease that stays stops counting when this process ends
            file.unlink()


def _leases(run: Path) -> Iterator[Lease]:
    for file in sorted((run / "leases").glob("*.json")):
        with suppress(FileNotFoundError):  # it ended a moment ago
            try:
                yield Lease.model_validate_json(file.read_bytes())
            except (OSError, ValidationError):
                # Half written by a reader that died, or damaged: it holds, for a day, what its name says.
                name = "-".join(file.name.split("-")[:2])
                yield Lease(checkpoint=name, host="", pid=1, time=file.lstat().st_mtime)
