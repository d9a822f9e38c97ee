"""Files that are written whole or not at all, and errors of writing that say what would work."""

import errno
import json
import os
import shutil
import uuid
from pathlib import Path

from minka.plan.errors import UserError
from minka.plan.ledger import finite

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside, synced, renamed over."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    # Not tempfile: its files may be read by their owner alone, and a run's folder is for the team.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
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


class writing:
    """Turn the errors of writing under `path` into a UserError that says what would work."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or error.errno is None:
            return
        what, where = f"cannot be written: {os.strerror(error.errno)}", str(error.filename or self.path)
        other = "choose another place (run.folder=..., data.store=...)"
        if error.errno in FORBIDDEN:
            raise UserError(
                what, where=where, why="this place may not be written", remedy=f"allow it, or {other}"
            ) from error
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise UserError(
            what,
            where=where,
            why=f"{free / 2**20:,.0f} MiB are free on its disk",
            remedy=f"free some space, or {other}",
        ) from error
