"""Who may read and write what a run writes is decided by the umask, for every file and folder of it."""

import os
from pathlib import Path

import pytest

from commands import minka, written
from minka.checkpoint.command import main as export
from minka.eval.command import main as evaluate
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from minka.report.command import main as report
from ranks import on_ranks
from tiny import tiny, train_rank


def modes(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if not path.is_relative_to(folder / "corpus")]
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in paths}


def expected(found: dict[str, str], folder: Path, umask: int) -> dict[str, str]:
    return {name: oct((0o777 if (folder / name).is_dir() else 0o666) & ~umask) for name in found}


def everything(config: RunConfig, umask: int) -> None:
    """Prepare, train, save, score, export and report."""
    os.umask(umask)
    run = str(RunFolder.of(config).path)
    assert train_rank(config) == 0
    assert evaluate([f"{run}@3", "eval.max_documents=2"]) == 0
    assert export([run, f"{config.run.folder}/exported"]) == 0
    assert report([run]) == 0


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_for_every_file_of_a_run_its_store_and_its_exports(umask: int, tmp_path: Path) -> None:
    kept = {"every_steps": 3, "export": True}
    data = {"tokenizer": "bpe"}
    config = tiny(tmp_path, run={"max_steps": 6}, model={"vocab": 300}, data=data, checkpoint=kept)
    assert on_ranks(everything, 1, config, umask) == [None]
    found = modes(tmp_path)
    assert {Path(name).suffix for name in found} >= {".safetensors", ".parquet", ".bin", ".json", ".jsonl", ".html"}
    assert found == expected(found, tmp_path, umask)


@pytest.mark.slow
def test_it_decides_for_the_logs_of_ranks_too(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 5})
    file, before = written(config), os.umask(0o007)
    try:
        done = minka("train", str(file), "--ranks", "2")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    found = modes(RunFolder.of(config).path)
    assert "logs/rank-00001.log" in found
    assert found == expected(found, RunFolder.of(config).path, 0o007)
