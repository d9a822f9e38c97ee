"""The files of a token store, as its manifest.json lists them: every command that reads one can check it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from minka.plan.errors import UserError
from minka.plan.read_file import MALFORMED, first_line, reading

MANIFEST = "manifest.json"
SHOWN_PROBLEMS = 5
BLOCK_BYTES = 2**24
REPAIR = "copy it again from an intact copy, or remove the folder and run `minka data prepare` again"


def check_store_files(store: Path, prefix: str, alive: Callable[[], None] = lambda: None) -> None:
    """Hash the files of `store` whose names start with `prefix` ("tokenizer/", "validation."): about a second a GB.

    `alive` is called for each block. Raises UserError naming those that are not what the manifest says.
    """
    with reading(store / MANIFEST, "a manifest", RecursionError, *MALFORMED, remedy=REPAIR):
        files = json.loads((store / MANIFEST).read_bytes())["files"]
        expected = {str(name): str(file["sha256"]) for name, file in files.items() if name.startswith(prefix)}
    problems = [] if expected else [f"{MANIFEST} lists no file {prefix}*"]
    for name, sha256 in expected.items():
        try:
            found = sha256_of(store / name, alive)
        except OSError as error:
            problems.append(f"{name} cannot be read: {first_line(error)}")
        else:
            problems += [f"{name} has changed since it was written (sha256 {found[:12]}..)"] * (found != sha256)
    if problems:
        raise damaged_store(store, *problems)


def sha256_of(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """The hash of one file, read in blocks; `alive` is called for each. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            alive()
    return digest.hexdigest()


def damaged_store(folder: Path, *problems: str) -> UserError:
    """The error for a store that is not what its manifest says."""
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return UserError(
        f"the store is damaged: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}",
        where=str(folder),
        remedy=REPAIR,
    )
