"""What the forker says of ranks that fail, with small processes in their places."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minka.plan.errors import ExitStatus
from minka.train import forker

REFUSED, FAILED = int(ExitStatus.REFUSED), int(ExitStatus.FAILED)


@pytest.mark.parametrize(
    ("endings", "status", "said"),
    [
        ([(1, REFUSED), (0, REFUSED)], REFUSED, 0),  # rank 0 has printed the same
        ([(0, REFUSED), (1, REFUSED)], REFUSED, 0),
        ([(1, REFUSED), (0, 0)], REFUSED, 1),
        ([(1, REFUSED), (0, FAILED)], REFUSED, 1),
        ([(1, FAILED), (0, REFUSED)], FAILED, 1),
    ],
)
def test_a_refusal_is_printed_once_and_never_lost(
    endings: list[tuple[int, int]], status: int, said: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(rank, status) in the order in which they end: each waits until the one before has closed its end of a pipe."""
    logs, started, before = {}, [], os.open(os.devnull, os.O_RDONLY)
    for rank, code in endings:
        log = tmp_path / f"rank-{rank}.log"
        log.write_text(f"why rank {rank}\n")
        after, held = os.pipe()
        waits = f"import os, sys; os.read({before}, 1); sys.exit({code})"
        started.append(subprocess.Popen([sys.executable, "-c", waits], pass_fds=(before, held)))
        os.close(before)
        os.close(held)
        before, logs[started[-1].pid] = after, (rank, log)
    assert forker._wait([process.pid for process in started], logs) == status
    os.close(before)
    errors = capsys.readouterr().err
    code = dict(endings)[1]
    assert errors == said * f"minka: rank 1 ended with status {code}.\n  why rank 1\n"
    for process in started:
        process.wait()
