"""The page's tables: checkpoints, and names that differ."""

from pathlib import Path

from ledgers import INTERRUPTED, run_of
from minka.report.page_data import checkpoint_rows, distinct_names
from minka.report.run_files import RunFiles


def test_checkpoints_are_those_of_the_ledger_and_those_on_disk(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", INTERRUPTED)
    for step in (5, 9):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step-{step:08d}" / "manifest.json").touch()
    (folder.checkpoints / "step-00000010").mkdir()  # not committed
    newest, saved = checkpoint_rows(RunFiles(str(folder.path)))
    assert newest == {"name": "step-00000009", "step": 9, "only_on_disk": True, "on_disk": True}
    assert (saved["step"], saved["size"], saved["stall_seconds"], saved["permanent"], saved["on_disk"]) == (
        5,
        "10 B",
        0.5,
        True,
        True,
    )
    (folder.checkpoints / "step-00000005" / "manifest.json").unlink()
    assert not checkpoint_rows(RunFiles(str(folder.path)))[1]["on_disk"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / place, name, []) for place, name in (("x", "a"), ("y", "a"), ("y", "b"))]
    assert distinct_names(folders) == ["x/a", "y/a", "b"]
