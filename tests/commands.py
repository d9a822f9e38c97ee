"""minka's commands as a user types them, each in its own process."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.load_config import dump_toml
from minka.plan.run_folder import RunFolder

STARTED: list["subprocess.Popen[str]"] = []
SOURCE = Path(__file__).resolve().parent.parent / ".ns"


def minka(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end."""
    command = [sys.executable, "-m", "minka", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def as_another_user() -> list[str]:
    """What is put before a command so that root has no right to files of others: an ordinary user may not reach this
    Python. Skips the test where that does not work."""
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("only root can give up its rights")
    if subprocess.run([*rights, sys.executable, "-c", "import torch"], capture_output=True, check=False).returncode:
        pytest.skip("without root's rights this Python cannot be started here")
    return rights


def train(config: RunConfig, *overrides: str, ranks: int = 2) -> "subprocess.Popen[str]":
    """Start `minka train` on a configuration."""
    return start("minka", "train", str(written(config)), *overrides, "--ranks", str(ranks))


def start(module: str, *arguments: str, **more: str) -> "subprocess.Popen[str]":
    """Start `python -m module`, with `more` in its environment. It ends with the test, if not before."""
    command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
    STARTED.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(**more)))
    return STARTED[-1]


def end_started() -> None:
    """Kill what a test has left running, as one does that fails while it waits."""
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def written(config: RunConfig) -> Path:
    """Write the configuration to a TOML file outside the run's folder."""
    file = Path(config.data.paths[0]).parent / f"{config.run.name}.toml"
    file.write_text(dump_toml(config))
    return file


def at_step(config: RunConfig, step: int) -> None:
    """Wait until the run has logged `step`."""
    while not any(e["event"] == "step" and e["step"] >= step for e in read_ledger(RunFolder.of(config).ledger_file)):
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes that it has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child that finds minka in the source tree."""
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **more}
