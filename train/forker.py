"""Forks the ranks from one process that has imported torch: eight forks take a third of a second, imports a minute.

The supervisor runs its `main`, with a Job as JSON on stdin. It exits with the ranks' status.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from minka.launch.environment import threads_per_rank, usable_cpus, visible_gpus
from minka.launch.supervisor import Job
from minka.launch.supervisor_link import ABOVE_RANKS, for_ranks, handle_stop_signals
from minka.plan.cli import print_error
from minka.plan.config import RunConfig
from minka.plan.console_output import install_output
from minka.plan.errors import ExitStatus, UserError
from minka.plan.read_file import first_line
from minka.plan.run_folder import RunFolder
from minka.train.parent_run import open_run
from minka.train.worker import check_gpus, complete_export, work

GRACE_SECONDS = 5.0
PROBE_BYTES = 2**16  # in the temporary folder; the ranks take less
ON_PURPOSE = (ExitStatus.STOPPED, ExitStatus.NEEDS_PERSON)


def main() -> int:
    """Prepare the data in one child, then run the ranks; the first failure decides the status.

    A job without ranks is of a finished run that lacks its export, which the child writes.
    """
    job = Job.model_validate(json.load(sys.stdin))
    die_with(job.supervisor)
    children = Children()
    # In a child: tokenizers and torch start threads, and a process with threads must not be forked from.
    children.pids.append(_fork(partial(_prepare, job), job.as_json, hold=False))
    status = _wait(children.pids, {})
    if not status and not children.stopping:
        with tempfile.TemporaryDirectory(prefix="minka-", ignore_cleanup_errors=True) as folder:
            children.pids, logs = [], {}
            for rank in range(job.ranks):
                body = partial(_rank, job, rank, f"{folder}/rendezvous")
                children.pids.append(_fork(body, job.as_json, hold=True))
                logs[children.pids[-1]] = (rank, _log(job.config, rank))
            status = _wait(children.pids, logs)
    elif not status:
        status = int(ExitStatus.FAILED)  # stopped before there were ranks
    handle_stop_signals(signal.SIG_IGN, ABOVE_RANKS)
    return status


class Children:
    """Passes stop signals on to the children of this process, which does not end by them."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.stopping = False
        handle_stop_signals(self._pass_on, ABOVE_RANKS)

    def _pass_on(self, received: int, frame: object) -> None:
        self.stopping = True
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, for_ranks(received))


def _prepare(job: Job) -> None:
    if not job.ranks:
        complete_export(job.config)
        return
    check_gpus(visible_gpus(os.environ))
    open_run(job.config, job.given)
    try:
        with tempfile.TemporaryFile() as file:  # the ranks meet in one
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        what = f"no temporary file can be written: {first_line(error)}"
        raise UserError(what, where="TMPDIR", remedy="set it to a folder on a local disk that has space") from None


def _log(config: RunConfig, rank: int) -> Path:
    """Where the output of a rank other than the first goes."""
    return RunFolder.of(config).logs / f"rank-{rank:05d}.log"


def die_with(parent: int | None) -> None:
    """Ask Linux to kill this process when its parent ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before we asked
            os._exit(int(ExitStatus.FAILED))


def _rank(job: Job, rank: int, store: str) -> int:
    threads = threads_per_rank(os.environ, job.ranks, usable_cpus())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks), MINKA_STORE=store)
    if rank:
        try:
            log = os.open(_log(job.config, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError:
            log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        install_output(waits=False)
    return work(job.model_copy(update={"threads": threads}))


def _fork(body: Callable[[], int | None], as_json: bool, *, hold: bool) -> int:
    """Run `body` in a child. `hold`: stop signals stay blocked until the body handles them (supervisor_link.py)."""
    sys.stdout.flush()
    sys.stderr.flush()
    me = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, ABOVE_RANKS)  # none may reach the child before it has its own handlers
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ABOVE_RANKS)
        return pid
    status = int(ExitStatus.FAILED)
    try:
        handle_stop_signals(_interrupt, ABOVE_RANKS)  # the forker's handlers are not the child's
        if not hold:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ABOVE_RANKS)
        die_with(me)
        status = int(body() or 0)
    except UserError as error:
        print_error(error, as_json=as_json)
        status = int(error.status)
    except KeyboardInterrupt:
        print("minka: interrupted before training began; nothing incomplete was kept.", file=sys.stderr)
    except SystemExit as end:
        status = int(end.code or 0)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the parent's atexit functions


def _interrupt(number: int, frame: object) -> None:
    """Have a child that prepares data remove what it has begun; a second signal must not stop it in that."""
    handle_stop_signals(signal.SIG_IGN, ABOVE_RANKS)
    raise KeyboardInterrupt


def _wait(pids: list[int], logs: dict[int, tuple[int, Path]]) -> int:
    """Wait for all. After the first failure the others get GRACE_SECONDS to end by themselves."""
    left, status, failed_at, said = set(pids), 0, 0.0, False
    unsaid: tuple[int, int, Path | None] | None = None
    while left:
        pid, raw = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.remove(pid)
            code = os.waitstatus_to_exitcode(raw)
            code = code if code >= 0 else int(ExitStatus.FAILED)
            rank, log = logs.get(pid, (0, None))
            said = said or (code == ExitStatus.REFUSED and not rank)
            if code and status in (0, *ON_PURPOSE) and status != code:
                status, failed_at = code, time.monotonic()
                if code == ExitStatus.REFUSED and rank:
                    unsaid = raw, rank, log  # rank 0 mostly says the same
                elif code not in ON_PURPOSE:
                    _report(raw, rank, log)
        elif not pid:
            time.sleep(0.02)
        # Ranks that stopped on purpose end by themselves: rank 0 still exports.
        if left and status not in (0, *ON_PURPOSE) and time.monotonic() - failed_at > GRACE_SECONDS:
            for other in left:
                os.kill(other, signal.SIGKILL)
            failed_at = float("inf")
    if unsaid and not said:
        _report(*unsaid)
    return status


def _report(raw: int, rank: int, log: Path | None) -> None:
    """Print which rank failed first, and the end of its log; rank 0 has printed its own error."""
    if os.WIFSIGNALED(raw):
        print(f"minka: rank {rank} ended by signal {os.WTERMSIG(raw)}.", file=sys.stderr)
    elif rank:
        print(f"minka: rank {rank} ended with status {os.waitstatus_to_exitcode(raw)}.", file=sys.stderr)
    if rank and log is not None and log.exists():
        tail = log.read_text(errors="replace").splitlines()[-20:]
        print("\n".join(f"  {line}" for line in tail), file=sys.stderr)
