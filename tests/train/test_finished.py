"""A finished run that is started again: it says so, and completes an export that was cut off."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from commands import minka, written
from minka.launch.exit_reason_file import write_exit_reason
from minka.launch.supervisor import Ending, Job, complete_exit_reason
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import EXPORT_MARKER, RunFolder
from minka.train.command import main
from minka.train.worker import work
from ranks import on_ranks
from tiny import tiny, train_rank


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of six steps, exported at its end."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny(folder, run={"max_steps": 6}, checkpoint={"export": True, "every_steps": 3})
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    return config


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lacking(folder: RunFolder, how: str) -> None:
    """What a killed export leaves, or a person."""
    marker = json.loads((folder.export / EXPORT_MARKER).read_text())
    if how == "of an earlier stop":
        marker["source"] = marker["source"].replace("step-00000006", "step-00000003")
    elif how == "of the run before --from-scratch":
        marker["sha256"] = "0" * 64
    else:
        shutil.rmtree(folder.export)
    if folder.export.exists():
        (folder.export / EXPORT_MARKER).write_text(json.dumps(marker))
    if how == "cut off":
        ended = subprocess.Popen(["true"])
        ended.wait()
        host = re.sub(r"[^\w-]", "-", socket.gethostname())
        for name in (f".export.{ended.pid}.0a1b2c3d.partial", f".export.{host}.{ended.pid}.0a1b2c3d.partial"):
            (folder.path / name).mkdir()
            (folder.path / name / "0.part").write_bytes(b"half")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["cut off", "deleted", "of an earlier stop", "of the run before --from-scratch"])
def test_an_export_that_is_missing_is_completed(how: str, ranks: int, finished: RunConfig) -> None:
    folder = RunFolder.of(finished)
    before = files(folder.path)
    lacking(folder, how)
    assert on_ranks(train_rank, ranks, finished) == [ExitStatus.DONE] * ranks
    assert files(folder.path) == before  # the ledger, too: nothing was trained


def test_a_whole_export_is_left_alone_and_none_is_made_that_is_not_wanted(finished: RunConfig) -> None:
    folder = RunFolder.of(finished)
    before = folder.export.stat().st_ino
    assert on_ranks(train_rank, 1, finished) == [ExitStatus.DONE]
    assert folder.export.stat().st_ino == before
    unwanted = finished.model_copy(update={"checkpoint": finished.checkpoint.model_copy(update={"export": False})})
    away = folder.export.rename(folder.path.parent / "away")
    assert on_ranks(train_rank, 1, unwanted) == [ExitStatus.DONE]
    assert not folder.export.exists()
    away.rename(folder.export)


def test_ranks_that_a_launcher_starts_do_not_make_a_finished_run_longer_unasked(finished: RunConfig) -> None:
    before = files(RunFolder.of(finished).path)
    longer = finished.model_copy(update={"run": finished.run.model_copy(update={"max_steps": 9})})
    assert on_ranks(train_unasked, 2, longer) == [ExitStatus.DONE] * 2
    assert files(RunFolder.of(finished).path) == before


def train_unasked(config: RunConfig) -> int:
    return work(Job(config=config, threads=1, given=()))


@pytest.mark.slow
def test_the_command_says_that_it_completes_an_export_and_the_next_one_only_that_the_run_is_over(
    finished: RunConfig,
) -> None:
    folder, command = RunFolder.of(finished), ("train", str(written(finished)), "--ranks", "2")
    before = files(folder.export)
    lacking(folder, "deleted")
    assert "its export is missing" in minka(*command, "--dry-run").stdout
    done = minka(*command)
    assert done.returncode == 0, done.stderr
    assert "writing it" in done.stdout
    assert "is finished. Its export:" in done.stdout
    assert {name: text for name, text in files(folder.export).items() if name != EXPORT_MARKER} == {
        name: text for name, text in before.items() if name != EXPORT_MARKER
    }
    again = minka(*command)
    assert again.returncode == 0
    assert "writing it" not in again.stdout
    assert "is finished. Its export:" in again.stdout


def test_a_start_that_is_refused_leaves_a_finished_run_finished(
    finished: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or its recipe, which may be longer than the run was, would lengthen it at the next start."""
    folder = RunFolder.of(finished)
    folder.stop_file.touch()
    assert main([str(folder.path), "--from-scratch", "--ranks", "1"]) == ExitStatus.NEEDS_PERSON
    assert "STOP" in capsys.readouterr().err
    folder.stop_file.unlink()
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], folder.finished()) == (ExitStatus.NEEDS_PERSON, True)
    complete_exit_reason(folder, Ending(int(ExitStatus.FAILED), "failed before training began", 0), None)
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], folder.finished()) == (ExitStatus.FAILED, True)
    write_exit_reason(folder, ExitStatus.DONE, "done", 6)


def test_a_first_start_does_not_write_into_the_folder_of_one_that_trains(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 5})
    folder = RunFolder.of(config)
    assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    for path in (folder.ledger_file, folder.exit_file):
        path.unlink()
    shutil.rmtree(folder.checkpoints)  # as the other start is when it has just created the run
    before = files(folder.path)
    with folder.only_writer(), pytest.raises(AssertionError, match="a different process is training this run"):
        on_ranks(train_rank, 1, config)
    assert files(folder.path) == before
