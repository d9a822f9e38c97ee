"""Whatever happens to a file of a run's folder, each reader names it, or its result is that of the whole folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import as_another_user
from families import trained
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.command import main as export
from minka.checkpoint.restore import whole_tensors
from minka.eval.command import main as evaluate
from minka.launch.supervisor import Job
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.report.write_report import write_report
from minka.train.command import main as train
from minka.train.parent_run import open_run
from minka.train.start_or_resume import read_and_check
from tiny import tiny

SCORES = "evals/step-00000008/heldout@1.json"
MANIFEST = "checkpoints/step-00000008/manifest.json"
CLOCKS = ("time", "seconds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints, scores and an export, in a folder with a copy of it; and one more of it."""
    kept = {"every_steps": 4, "keep": 9, "export": True}
    shape: dict[str, Any] = {"schedule": {"kind": "constant"}, "checkpoint": kept, "eval": {"every_steps": 4}}
    config = tiny(tmp_path_factory.mktemp("whole"), run={"name": "base", "max_steps": 8}, **shape)
    trained(config)
    path = RunFolder.of(config).path
    shutil.copytree(path, path.with_name("copy"))
    return path


@pytest.fixture
def run(whole: Path) -> Path:
    """The run as it was: its configuration names this very folder."""
    shutil.rmtree(whole)
    shutil.copytree(whole.with_name("copy"), whole)
    return whole


def resumed(run: Path) -> Any:
    """What `minka train` and its dry run do before there are ranks.

    Settings that differ from those of the last start are refused, or printed and recorded (tests/train/test_resume.py).
    """
    job = Job(config=load_run(str(run), ["run.max_steps=12"]).config)
    outlook = read_and_check(job)
    open_run(job.config)
    return outlook.step


def exported(run: Path) -> Any:
    out = run.with_name("out")
    succeed(export([str(run), str(out)]))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in out.rglob("*.*")}


def scored(run: Path) -> Any:
    succeed(evaluate([str(run)]))
    found = json.loads((run / SCORES).read_text())
    return {key: value for key, value in found.items() if key not in CLOCKS}


def succeed(status: int) -> None:
    if status:
        raise SystemExit(status)


def reported(run: Path) -> Any:
    _, page = write_report([str(run)], run.with_name("report.html"))
    (found,) = page["runs"]
    print(found["warnings"])
    return found["headline"]


def replayed(run: Path) -> Any:
    succeed(train([str(run), "--replay", "6"]))
    return {}


READERS = {"resume": resumed, "export": exported, "eval": scored, "report": reported, "replay": replayed}


def outcome(reader: str, run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """What a reader makes, or its exit status; and all that it says."""
    made: Any = None
    try:
        made = READERS[reader](run)
    except UserError as error:
        return error.status, str(error)
    except SystemExit as end:
        made = end.code
    return made, "".join(capsys.readouterr())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)  # a link to itself


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "cut": cut,
    "empty": lambda file: os.truncate(file, 0),
    "delete": lambda file: file.unlink(),
    "folder": folder,
    "dangle": dangle,
    "other": lambda file: file.write_bytes(b"\xff\xfe[{"),
    "unreadable": lambda file: file.chmod(0),  # as one of another owner; root reads it all the same
}
FILES = [
    "run.toml",
    "provenance.json",
    "ledger.jsonl",
    "exit_reason.json",
    SCORES,
    "export/config.json",
    "export/minka_export.json",
    MANIFEST,
]


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, Any]:
    """What the readers make of the whole folder, but for what they say."""
    return {name: reader(whole) for name, reader in READERS.items()}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [pytest.param(d, marks=() if d == "folder" else pytest.mark.slow) for d in DAMAGES])
def test_damage_is_named_or_harmless(
    damage: str, file: str, right: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reader in READERS:
        if (reader, file) == ("resume", MANIFEST):
            continue  # tests/checkpoint/test_damage.py: the restore names it, and takes the one before
        shutil.rmtree(run)
        shutil.copytree(run.with_name("copy"), run)
        DAMAGES[damage](run / file)
        capsys.readouterr()
        made, said = outcome(reader, run, capsys)
        named = Path(file).stem in said and (reader == "report" or made in (2, 86))  # a page says it, and is made
        assert made == right[reader] or named, f"{reader}: {made}, {said}"
        assert "Traceback" not in said


@pytest.mark.slow
def test_files_of_another_owner_are_named_too(tmp_path: Path) -> None:
    """The same without root's right to read everything."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    chosen = [__file__, "-k", "test_damage_is_named_or_harmless and unreadable"]
    done = subprocess.run([*as_another_user(), *tests, *chosen], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{len(FILES)} passed" in done.stdout


@pytest.mark.parametrize("reader", ["export", "eval"])
def test_weights_are_not_read_as_a_different_model(reader: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One digit of run.toml: every value is valid, and the weights would be those of a different function."""
    file = run / "run.toml"
    before = file.read_text()
    file.write_text(before.replace("rope_theta = 10000.0", "rope_theta = 50000.0"))
    assert file.read_text() != before
    _, said = outcome(reader, run, capsys)
    assert f"{file}: this is not the model that the run was trained as: model.rope_theta = 50000.0" in said


def test_a_run_with_a_damaged_ledger_and_no_scores_resumes_to_the_same_weights(run: Path) -> None:
    """By the ranks themselves, after the folder was checked."""
    longer = load_run(str(run), ["run.max_steps=12"]).config
    trained(longer)
    wanted = dict(whole_tensors(checkpoints(run / "checkpoints")[-1], "model."))
    shutil.rmtree(run)
    shutil.copytree(run.with_name("copy"), run)
    cut(run / "ledger.jsonl")
    shutil.rmtree(run / "evals")
    trained(longer)
    found = dict(whole_tensors(checkpoints(run / "checkpoints")[-1], "model."))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
