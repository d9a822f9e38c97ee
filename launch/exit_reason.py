"""exit_reason.json: how a run ended, for whoever starts it again, a person or a scheduler."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from minka.plan.atomic import write_json
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import is_count, parse, read_ledger
from minka.plan.run_folder import RunFolder


class Ending(NamedTuple):
    """What exit_reason.json says, and which file it was: another ending is another file."""

    code: int
    file: tuple[int, int]  # inode, and when it was written


def read_ending(folder: RunFolder) -> Ending | None:
    """The run's last ending; None where there is none, or one that says nothing."""
    try:
        stat = folder.exit_file.stat()
        code = parse(folder.exit_file.read_bytes())["code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Ending(code, (stat.st_ino, stat.st_mtime_ns)) if is_count(code) else None


def write_ending(folder: RunFolder, status: int, reason: str, step: int, *, requeue: bool = False) -> None:
    """Say how the run ended; on a disk that takes nothing, on stderr that this is not said."""
    try:
        write_json(folder.exit_file, {"code": int(status), "reason": reason, "step": step, "requeue": requeue})
    except OSError as error:
        print(f"minka: {folder.exit_file} could not be written: {error.strerror}", file=sys.stderr)


@contextmanager
def explained(folder: RunFolder, *, speaks: bool = True) -> Iterator[None]:
    """A refusal within that needs a person is the run's ending, and stands in its folder where that may be written."""
    try:
        yield
    except UserError as error:
        if speaks and error.status == ExitStatus.NEEDS_PERSON and folder.exists():
            _explain(folder, error)
        raise


def _explain(folder: RunFolder, error: UserError) -> None:
    try:
        with folder.only_writer():  # of a run that another process trains, the ending is that one's to tell
            steps = [event["step"] for event in read_ledger(folder.ledger_file, with_steps=False)]
            write_ending(folder, error.status, error.what, steps[-1] if steps else 0)
    except UserError:
        return  # the refusal itself is what people are told
