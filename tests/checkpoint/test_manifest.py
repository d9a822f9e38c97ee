"""A manifest is believed only as it was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minka.checkpoint.manifest import KEYS, read_header
from minka.checkpoint.restore import restore
from saved import ALONE, save, tensors


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Another JSON document in the manifest's place."""
    file = path / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def without(key: str) -> Callable[[Any], Any]:
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


SPOILT: dict[str, Callable[[Any], Any]] = {
    "a number of the state": lambda m: m | {"state": {"step": 3}},
    "the place of a piece": lambda m: m | {"tensors": m["tensors"] | {"model.b": m["tensors"]["count"]}},
    "no object": lambda m: [m],
    "no word": lambda m: None,
    "another format": lambda m: m | {"format": 3},
    **{f"no {key}": without(key) for key in KEYS},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_manifest_that_is_not_as_it_was_written_is_damage(spoilt: str, tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), {"step": 1}, ALONE)
    newest = save(tmp_path, 2, tensors(2), {"step": 2}, ALONE).path
    rewrite(newest, SPOILT[spoilt])
    with pytest.raises(ValueError, match="manifest"):
        load_manifest(newest)
    passed: list[Path] = []
    assert restore(tmp_path, tensors(), ALONE, lambda path, reason: passed.append(path)) == {"step": 1}
    assert passed == [newest]


def test_the_seal_of_a_manifest_holds_for_whatever_the_state_is(tmp_path: Path) -> None:
    state = {"nan": float("nan"), "tuple": (1, 2), "keys": {10: "a", 9: "b"}, "float": 0.1 + 0.2}
    path = save(tmp_path, 1, tensors(), state, ALONE).path
    read = read_header(path).state
    assert read == {"nan": "NaN", "tuple": [1, 2], "keys": {"10": "a", "9": "b"}, "float": 0.1 + 0.2}
