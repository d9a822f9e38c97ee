"""What a checkpoint says of itself: its manifest, sealed by a hash of its own, and the hashes of its files."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minka.plan.ledger import finite

FORMAT = 1
NAME = "manifest.json"
CHUNK_BYTES = 16 * 2**20
KEYS = ("step", "state", "files", "tensors", "sha256")


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with the format and the sha256 of everything else in it: what `load_manifest` will check."""
    whole = {"format": FORMAT, **body}
    return {**whole, "sha256": _digest(whole)}


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `path`.

    Raises OSError when it cannot be read, and ValueError when it is damaged or of a format that is not known.
    """
    file = path / NAME
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} holds no JSON object")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')!r}, not {FORMAT}")
    missing = [key for key in KEYS if key not in manifest]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    if manifest["sha256"] != _digest({key: value for key, value in manifest.items() if key != "sha256"}):
        raise ValueError(f"{file} does not match its own hash")
    return manifest


def check_hashes(folder: Path, file: str, entry: Mapping[str, Any], alive: Callable[[], None]) -> None:
    """Raises ValueError naming the chunk of `file` whose hash does not hold."""
    found = hash_chunks(folder / file, alive)
    if found != list(entry["sha256"]):
        wrong = next((i for i, (a, b) in enumerate(zip(found, entry["sha256"], strict=False)) if a != b), len(found))
        raise ValueError(f"{folder / file}: chunk {wrong} ({CHUNK_BYTES} bytes each) does not match its hash")


def hash_chunks(path: Path, alive: Callable[[], None]) -> list[str]:
    """sha256 of each CHUNK_BYTES of a file; `alive` is called after each."""
    found = []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.append(hashlib.sha256(chunk).hexdigest())
            alive()
    return found


def _digest(body: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `body` as it reads back: keys are strings there, and tuples lists."""
    plain = json.loads(json.dumps(finite(body), allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
