"""Under torchrun and Slurm minka is a rank: no supervisor of its own, and nothing but its own exit status."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import at_step, children, environment, start, written
from families import trained
from minka.checkpoint.catalogue import checkpoints
from minka.data.prepare import store_folder
from minka.plan.errors import ExitStatus
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from tiny import tiny


def test_joins_ranks_that_torchrun_started(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    file = written(config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minka"]
    done = subprocess.run(
        [*command, "train", str(file)], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    steps = [line for line in read_ledger(RunFolder.of(config).ledger_file) if line["event"] == "step"]
    assert len(steps) == 20
    assert "note: 19% of each step is spent on padding sequences: a batch of 13" in done.stdout
    assert re.search(r"^trained +step 20 of 20", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_rank_stops_and_saves_when_its_launcher_is_gone(tmp_path: Path) -> None:
    """torchrun dies of SIGUSR1, which a scheduler sends before the time is up."""
    config = tiny(tmp_path, run={"max_steps": 100_000})
    folder = RunFolder.of(config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minka"]
    with subprocess.Popen([*command, "train", str(written(config))], env=environment()) as agent:
        at_step(config, 3)
        agent.send_signal(signal.SIGUSR1)
        agent.wait(timeout=60)
    until = time.monotonic() + 120
    while not folder.exit_file.exists():
        assert time.monotonic() < until, "the ranks train on without a launcher"
        time.sleep(0.1)
    assert json.loads(folder.exit_file.read_text())["code"] == ExitStatus.STOPPED
    assert len(checkpoints(folder.checkpoints)) == 1


@pytest.mark.slow
def test_torchrun_starts_no_run_again_that_has_stopped(tmp_path: Path) -> None:
    """With --max-restarts it starts the ranks again, which must not undo the stop."""
    config = tiny(tmp_path, run={"max_steps": 100_000})
    folder = RunFolder.of(config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"]
    agent = subprocess.Popen(
        [*command, "-m", "minka", "train", str(written(config))], env=environment(), stderr=subprocess.PIPE, text=True
    )
    at_step(config, 3)
    (rank,) = children(agent.pid)
    os.kill(rank, signal.SIGTERM)
    _, errors = agent.communicate(timeout=120)
    assert "this job has stopped already" in errors, errors
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], ending["requeue"]) == (ExitStatus.STOPPED, True)
    starts = [event for event in read_ledger(folder.ledger_file) if event["event"] == "start"]
    assert len(starts) == 1
    assert agent.returncode == 1  # torchrun's own; a job script reads the file
    script = 'python3 -c \'import json; print(json.load(open("exit_reason.json"))["code"])\''
    code = subprocess.run(["bash", "-c", script], cwd=folder.path, capture_output=True, text=True, check=True)
    assert int(code.stdout) == ExitStatus.STOPPED


def srun(file: Path, *overrides: str) -> list[tuple[int, str]]:
    """Exit status and stderr of two tasks of a job step."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step["SLURM_STEP_NODELIST"] = "localhost"
    tasks = [
        start("minka", "train", str(file), *overrides, **step, SLURM_PROCID=task, SLURM_LOCALID=task)
        for task in ("0", "1")
    ]
    errors = [task.communicate()[1] for task in tasks]
    return [(task.returncode, said) for task, said in zip(tasks, errors, strict=True)]


@pytest.mark.slow
def test_joins_ranks_that_srun_started(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    for status, errors in srun(written(config)):
        assert status == 0, errors
    steps = [line for line in read_ledger(RunFolder.of(config).ledger_file) if line["event"] == "step"]
    assert len(steps) == 20


@pytest.mark.slow
def test_no_rank_waits_for_a_first_rank_that_has_nothing_to_do_or_refuses(tmp_path: Path) -> None:
    """No agent ends the tasks of a job step. The ranks have no process group yet."""
    config = tiny(tmp_path, run={"max_steps": 2}, data={"batch_warmup": []}, schedule={"kind": "constant", "warmup": 1})
    file = written(config)
    trained(config, ranks=2)
    shutil.rmtree(store_folder(config, Path()))
    over = srun(file)  # it is finished: the store is neither made nor waited for
    assert [status for status, _ in over] == [0, 0], over
    other = srun(file, "run.name=other", "run.start_from=missing")
    assert [status for status, _ in other] == [2, 2], other
    assert "missing" in other[0][1]
    assert "Traceback" not in other[0][1] + other[1][1]
