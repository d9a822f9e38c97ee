"""A manifest is believed only as it was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minka.checkpoint.manifest import FORMAT, Header, read_header
from minka.checkpoint.restore import restore
from saved import ALONE, save, tensors


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """A different JSON document in the manifest's place, in the same text where it is an object."""
    file = path / "manifest.json"
    changed = change(json.loads(file.read_text()))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in changed.items()] if changed else []
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n" if lines else json.dumps(changed))


def without(key: str) -> Callable[[Any], Any]:
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


SPOILT: dict[str, Callable[[Any], Any]] = {
    "a number of the state": lambda m: m | {"state": {"step": 3}},
    "the hash of the index": lambda m: m | {"index": m["index"] | {"sha256": "0" * 64}},
    "no object": lambda m: [],
    "no word": lambda m: None,
    "another format": lambda m: m | {"format": FORMAT + 1},
    **{f"no {key}": without(key) for key in Header.model_fields if key != "old_tables"},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_manifest_that_is_not_as_it_was_written_is_damage(spoilt: str, tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"step": 1}, ALONE)
    newest = save(tmp_path, 2, tensors(2), {"step": 2}, ALONE).path
    rewrite(newest, SPOILT[spoilt])
    with pytest.raises(ValueError, match="manifest"):
        read_header(newest)
    passed: list[Path] = []
    assert restore(tmp_path, tensors(), ALONE, lambda path, reason: passed.append(path)) == {"step": 1}
    assert passed == [newest]


def test_the_seal_of_a_manifest_holds_for_whatever_the_state_is(tmp_path: Path) -> None:
    state = {"nan": float("nan"), "tuple": (1, 2), "keys": {10: "a", 9: "b"}, "float": 0.1 + 0.2}
    path = save(tmp_path, 1, tensors(), state, ALONE).path
    read = read_header(path).state
    assert read == {"nan": "NaN", "tuple": [1, 2], "keys": {"10": "a", "9": "b"}, "float": 0.1 + 0.2}
