"""The file of an evaluation: evals/step-XXXXXXXX/SUITE@VERSION.json."""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minka.eval.bits_per_byte import Scores
from minka.plan.atomic import write_json
from minka.plan.ledger import parse_json

SUITE = "heldout"
VERSION = 1


def write_result(
    evals: Path,
    step: int,
    tokens: int,
    scores: Scores,
    samples: Sequence[tuple[str, str]] | None = None,
    checkpoint: Path | None = None,
    *,
    own_settings: bool = True,
    output: Path | None = None,
) -> dict[str, Any]:
    """Write the result of `scores` and return its content plus its `path`. Raises OSError.

    With settings that are not the run's (`own_settings` is false) or not those of the existing file, the file is
    heldout@1-HASH.json, named by a hash of the settings. `samples`: None keeps those of the replaced file.
    `checkpoint`: None if weights in memory were scored. `output`: the file to write, instead of one below `evals`.
    """
    file = output or evals / f"step-{step:08d}" / f"{SUITE}@{VERSION}.json"
    if not output:
        file.parent.mkdir(parents=True, exist_ok=True)
    found = _read(file)  # one that cannot be read is replaced
    if not output and (not own_settings or (found and found.get("settings") != scores.settings)):
        settings = json.dumps(scores.settings, sort_keys=True)
        file = file.with_name(f"{SUITE}@{VERSION}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.json")
    texts = [{"prompt": prompt, "text": text} for prompt, text in samples or ()]
    result = {
        "format": 1,
        "suite": SUITE,
        "version": VERSION,
        "step": step,
        "tokens": tokens,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        **scores._asdict(),
        "stderr": {name: error if math.isfinite(error) else None for name, error in scores.stderr.items()},
        "samples": _read(file).get("samples", []) if samples is None else texts,
    }
    write_json(file, result)
    return result | {"path": str(file)}


def _read(file: Path) -> dict[str, Any]:
    """Return an existing result; empty if there is none, or if it cannot be read."""
    found = None
    with suppress(OSError, ValueError):
        found = parse_json(file.read_bytes())
    return found if isinstance(found, dict) else {}
