"""exit_reason.json: why a run ended, for a person or a scheduler that starts it again."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from minka.launch.environment import job_name, requeued
from minka.plan.atomic import write_json
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import is_count, lines_from_end, parse_event, parse_json
from minka.plan.run_folder import RunFolder


class ExitReason(NamedTuple):
    """The code in an exit_reason.json, and which file it was: every exit writes a new file."""

    code: int
    file: tuple[int, int]  # inode, time of the last change


def read_exit_reason(folder: RunFolder) -> ExitReason | None:
    """The run's last exit reason; None where there is none, or none that can be read."""
    try:
        stat = folder.exit_file.stat()
        code = parse_json(folder.exit_file.read_bytes())["code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ExitReason(code, (stat.st_ino, stat.st_mtime_ns)) if is_count(code) else None


def stopped_under_this_agent(folder: RunFolder) -> ExitStatus | None:
    """With which status this process's torchrun has seen the run stop, before it started the ranks again; None: not.

    A first start is never such a one: in a new container, torchrun may have the number of the one before.
    """
    if not requeued(os.environ):
        return None
    agent = _agent(os.environ)
    try:
        ending = parse_json(folder.exit_file.read_bytes())
        stopped = ending["code"] in (ExitStatus.STOPPED, ExitStatus.NEEDS_PERSON) and ending.get("agent")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ExitStatus(ending["code"]) if stopped and stopped == agent.get("agent") else None


def _agent(environment: Mapping[str, str]) -> dict[str, str]:
    """Which torchrun has started this process: it is the same one for all its restarts."""
    return {"agent": job_name(environment)} if "TORCHELASTIC_RESTART_COUNT" in environment else {}


def write_exit_reason(
    folder: RunFolder, status: int, reason: str, step: int, *, requeue: bool = False, finished: bool = False
) -> None:
    """Write why the run ended. Where the disk refuses the file, say so on stderr.

    `finished`: it had reached its end before this start, which has not trained it.
    """
    try:
        ending = {"code": int(status), "reason": reason, "step": step, "requeue": requeue}
        write_json(folder.exit_file, {**ending, **({"finished": True} if finished else {}), **_agent(os.environ)})
    except OSError as error:
        print(f"minka: {folder.exit_file} could not be written: {error.strerror}", file=sys.stderr)


@contextmanager
def refusals_recorded(folder: RunFolder, *, writes: bool = True) -> Iterator[None]:
    """Make a refusal that needs a person the run's exit reason. A process that trains the run writes its own."""
    try:
        yield
    except UserError as error:
        if writes and error.status == ExitStatus.NEEDS_PERSON and folder.exists():
            with suppress(UserError), folder.only_writer():
                write_exit_reason(folder, error.status, error.what, _last_step(folder), finished=folder.finished())
        raise


def _last_step(folder: RunFolder) -> int:
    if not folder.ledger_file.exists():
        return 0
    with folder.ledger_file.open("rb") as ledger:
        events = (parse_event(line) for _, line in lines_from_end(ledger))
        return next((int(event["step"]) for event in events if event), 0)
