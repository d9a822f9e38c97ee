"""How often a resume reads the ledger and the manifests, counted in all of its processes before its first step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import SOURCE, environment, written
from families import trained
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from tiny import tiny

# Python imports this module in every process; forks inherit its hook.
HOOK = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
    watched = path.endswith("ledger.jsonl") or "/checkpoints/step-" in path and path.endswith("manifest.json")
    if watched and not flags & (os.O_APPEND | os.O_CREAT):
        size = os.path.getsize({ledger!r})  # says when: the first step makes it grow
        os.write(log, (str(size) + " " + path + chr(10)).encode())

sys.addaudithook(note)
"""


def test_a_resume_of_two_ranks_reads_the_ledger_once_and_opens_three_manifests(tmp_path: Path) -> None:
    config = run(tmp_path, max_steps=12)
    trained(config, ranks=2)
    command = [sys.executable, "-m", "minka", "train", str(written(config)), "run.max_steps=16", "--ranks", "2"]
    ledgers, manifests = reads(tmp_path, command)
    assert len(list(RunFolder.of(config).checkpoints.glob("step-*/manifest.json"))) == 3
    assert ledgers == 1
    assert manifests == 3  # one to say where the run stands, and one a rank to restore it


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "manifests"), [(False, 3), (True, 4)])
def test_a_resume_under_torchrun_reads_as_little(lost: bool, manifests: int, tmp_path: Path) -> None:
    """`lost`: a crash came after the last save, before its event; then that manifest and the one before it decide."""
    config = run(tmp_path, max_steps=12)
    trained(config, ranks=2)
    if lost:
        ledger = RunFolder.of(config).ledger_file
        lines = ledger.read_text().splitlines(keepends=True)
        last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == "save")
        ledger.write_text("".join(lines[:last]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minka"]
    assert reads(tmp_path, [*torchrun, "train", str(written(config)), "run.max_steps=16"]) == (1, manifests)


def run(folder: Path, max_steps: int) -> RunConfig:
    """A run with three checkpoints at its end."""
    saves = {"every_steps": 4, "keep": 3}
    return tiny(folder, run={"max_steps": max_steps}, checkpoint=saves, tracking={"log_every": 1})


def reads(folder: Path, command: list[str]) -> tuple[int, int]:
    """How many times the command opens a ledger to read it, and a manifest of a checkpoint, before its first step."""
    log, hook = folder / "opened", folder / "hook"
    hook.mkdir()
    ledger = folder / "runs" / "tiny" / "ledger.jsonl"
    (hook / "sitecustomize.py").write_text(HOOK.format(log=str(log), ledger=str(ledger)))
    before = ledger.stat().st_size
    done = subprocess.run(
        command,
        env=environment(PYTHONPATH=f"{hook}:{SOURCE}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = ledger.read_bytes()[before:].splitlines(keepends=True)
    assert [json.loads(line)["event"] for line in lines][:3] == ["restore", "start", "step"]
    first_step = before + len(lines[0] + lines[1])
    opened = [line.split(" ", 1) for line in log.read_text().splitlines()]
    paths = [path for size, path in opened if int(size) <= first_step]
    return len([p for p in paths if p.endswith(".jsonl")]), len([p for p in paths if p.endswith(".json")])
