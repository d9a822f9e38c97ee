"""A run whose console, logs and trackers are gone is the run that has them."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from commands import environment, written
from minka.plan.errors import ExitStatus
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank


@pytest.mark.slow
def test_no_report_ends_or_slows_or_changes_a_run(tmp_path: Path) -> None:
    """Standard output is a pipe that nobody reads, standard error is closed, the disk of the logs is full."""
    straight = tiny(tmp_path, run={"name": "straight"}, schedule={"kind": "constant"})
    silent = tiny(
        tmp_path,
        run={"name": "silent"},
        schedule={"kind": "constant"},
        checkpoint={"every_steps": 4},
        eval={"prompts": ["caf\u00e9 \u2192"]},
        tracking={"log_every": 1, "tensorboard": True, "wandb": "offline"},
    )
    folder = RunFolder.of(silent)
    on_ranks(train_rank, 1, straight)
    on_ranks(train_rank, 1, silent.model_copy(update={"run": silent.run.model_copy(update={"max_steps": 6})}))
    for file in ("samples-00000.jsonl", "stacks-00000.txt", "trace-00000.json"):
        (folder.logs / file).unlink(missing_ok=True)
        (folder.logs / file).symlink_to("/dev/full")
    for path in (folder.tensorboard, folder.path / "wandb"):
        path.rename(path.with_suffix(".before"))
        path.write_text("not a folder")
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, b"x" * 512):
            pass
    os.set_blocking(writer, True)
    command = f"exec {sys.executable} -m minka train {written(silent)} run.max_steps=20 --ranks 1 --profile 8:10 2>&-"
    done = subprocess.run(
        ["bash", "-c", command], stdout=writer, env=environment(PYTHONIOENCODING="ascii"), timeout=300, check=False
    )
    assert done.returncode == ExitStatus.DONE
    assert folder.finished()
    events = list(read_ledger(folder.ledger_file))
    failed = {e["reason"].split(":")[0] for e in events if e["event"] == "report_failed"}
    assert failed == {"output", "samples", "tensorboard", "wandb"}
    assert losses(folder) == losses(RunFolder.of(straight))


def losses(folder: RunFolder) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_ledger(folder.ledger_file) if e["event"] == "step"}
