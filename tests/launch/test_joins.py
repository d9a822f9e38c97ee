"""Under torchrun and Slurm minka is a rank: no supervisor of its own, and nothing but its own exit status."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, start, written
from families import trained
from minka.data.prepare import store_folder
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
