"""Which folders are checkpoints, which of them is meant, and which go."""

import os
import shutil
from pathlib import Path

import pytest

from minka.checkpoint.catalogue import Catalogue, checkpoints, find_checkpoint, run_and_step
from minka.checkpoint.restore import restore
from minka.plan.errors import UserError
from saved import ALONE, save, silent, tensors


def test_hidden_folders_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {}, ALONE).path
    for name in (".step-00000002.saving-1f3a", ".step-00000001.deleting", "step-00000001-copy", "step-0000000001"):
        shutil.copytree(path, tmp_path / name)
    shutil.rmtree(path)
    assert restore(tmp_path, tensors(), ALONE, silent) is None
    assert checkpoints(tmp_path) == []


def test_a_file_with_a_checkpoints_name_is_damage_and_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {"step": 1}, ALONE).path
    (tmp_path / "step-00000009").touch()
    passed: list[str] = []
    assert restore(tmp_path, tensors(), ALONE, lambda path, reason: passed.append(reason)) == {"step": 1}
    assert "step-00000009" in passed[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "step-00000009.damaged-1"]


def test_prune_keeps_the_newest_and_find_names_what_there_is(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tensors(step), {"step": step}, ALONE)
    assert [p.name for p in Catalogue(tmp_path).prune(2)] == ["step-00000001"]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert find_checkpoint(tmp_path, "2").name == "step-00000002"
    with pytest.raises(UserError, match="step 7") as caught:
        find_checkpoint(tmp_path, "7")
    assert "2, 3" in str(caught.value)


def test_prune_keeps_what_was_written_last_not_what_has_the_highest_step(tmp_path: Path) -> None:
    """After a fall-back the damaged ones above must not push out the whole ones."""
    for step in (500, 600, 450):
        save(tmp_path, step, tensors(), {"step": step}, ALONE)
    assert [p.name for p in Catalogue(tmp_path).prune(1)] == ["step-00000500", "step-00000600"]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000450"]


def test_prune_never_raises_and_is_not_in_the_way_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tensors(), {}, ALONE)
    stale = tmp_path / ".step-00000001.deleting" / "rank-00000.safetensors"
    stale.parent.mkdir()
    stale.touch()
    rename = os.rename

    def refusing(source: Path, target: Path) -> None:
        if Path(source).name == "step-00000002":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    assert [p.name for p in Catalogue(tmp_path).prune(1)] == ["step-00000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("t", ("t", "")),
        ("t@40", ("t", "40")),
        ("runs/t", ("runs/t", "")),
        ("runs/t/@7", ("runs/t", "7")),
        ("runs/t/run.toml", ("runs/t", "")),
        ("/a@b/t/run.toml@40", ("/a@b/t", "40")),
        ("run.toml", (".", "")),
        (".", (".", "")),
    ],
)
def test_a_run_is_named_by_name_folder_or_file_with_or_without_a_step(given: str, meant: tuple[str, str]) -> None:
    assert run_and_step(given) == meant
