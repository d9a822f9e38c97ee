"""The files of a token store, as its manifest.json lists them: every command that reads one can check it."""

import hashlib
import json
from pathlib import Path

from minka.plan.errors import UserError
from minka.plan.read_file import MALFORMED, first_line, reading

MANIFEST = "manifest.json"
SHOWN_PROBLEMS = 5
REPAIR = "copy it again from an intact copy, or remove the folder and run `minka data prepare` again"


def check_store_files(store: Path, prefix: str) -> None:
    """Hash the files of `store` whose names start with `prefix` ("tokenizer/", "validation."): about a second a GB.

    Raises UserError naming those that are not what the manifest says.
    """
    with reading(store / MANIFEST, "a manifest", RecursionError, *MALFORMED, remedy=REPAIR):
        files = json.loads((store / MANIFEST).read_bytes())["files"]
        expected = {str(name): str(file["sha256"]) for name, file in files.items() if name.startswith(prefix)}
    problems = [] if expected else [f"{MANIFEST} lists no file {prefix}*"]
    for name, sha256 in expected.items():
        try:
            found = sha256_of(store / name)
        except OSError as error:
            problems.append(f"{name} cannot be read: {first_line(error)}")
        else:
            problems += [f"{name} has changed since it was written (sha256 {found[:12]}..)"] * (found != sha256)
    if problems:
        raise damaged_store(store, *problems)


def sha256_of(path: Path) -> str:
    """The hash of one file, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_store(folder: Path, *problems: str) -> UserError:
    """The error for a store that is not what its manifest says."""
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return UserError(
        f"the store is damaged: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}",
        where=str(folder),
        remedy=REPAIR,
    )
