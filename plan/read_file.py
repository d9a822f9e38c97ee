"""Read files, with errors for people: which file, the reason, and what to do."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minka.plan.errors import UserError

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what values of a different shape raise


@contextmanager
def reading(path: Path, kind: str = "", *errors: type[Exception], why: str = "", remedy: str = "") -> Iterator[None]:
    """Turn an OSError, or one of `errors`, of the block into a UserError: `path` cannot be read as `kind`."""
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except expected as error:
        what = f"cannot be read{f' as {kind}' if kind else ''}: {first_line(error)}"
        raise UserError(what, where=str(path), why=why, remedy=remedy) from None


def read_json(path: Path, *, why: str = "", remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for a missing or unreadable file, and for any other content."""
    with reading(path, "JSON", ValueError, RecursionError, why=why, remedy=remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path), why=why, remedy=remedy)
    return value


def read_toml(path: Path, *, remedy: str) -> dict[str, Any]:
    """The table in a TOML file. Raises UserError for a missing or unreadable file, and for any other content."""
    with reading(path, "TOML", ValueError, remedy=remedy):
        return tomllib.loads(path.read_text(encoding="utf-8"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; for a system error its reason, without the path."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return (message or type(error).__name__).splitlines()[0]
