"""The supervisor: owns the ranks of this machine, which train/forker.py forks, and never imports torch.

It passes signals on, reads the ranks' heartbeats from a pipe, has them write their stacks and ends them when one stops
beating, and decides the exit status.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal, NamedTuple

from pydantic import BaseModel

from minka.launch.exit_reason_file import ExitReason, read_exit_reason, write_exit_reason
from minka.launch.supervisor_link import ABOVE_RANKS, STACKS_SIGNAL, for_ranks, handle_stop_signals
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.resume_rules import LENGTH
from minka.plan.run_folder import RunFolder
from minka.plan.run_state import RunState

TURN_SECONDS = 1.0  # a turn of the supervisor's loop that took longer was not all its own
KILL_SECONDS = 15.0  # without a heartbeat, for ranks that have been asked to save and to stop
FORKER = (  # what torch logs while it is imported must not hold up the run either
    "import sys; from minka.plan.console_output import install_output; install_output(waits=False); "
    "from minka.train.forker import main; sys.exit(main())"
)
INTERRUPTED = "interrupted twice"
BY_THE_RANKS = (ExitStatus.DONE, ExitStatus.REFUSED, ExitStatus.STOPPED, ExitStatus.NEEDS_PERSON)  # they give a reason


class Job(BaseModel, frozen=True):
    """What to train, for the forker (as JSON on its stdin) and for each rank."""

    config: RunConfig
    state: RunState | None = None  # of the run before this start; under torchrun and Slurm the first rank reads it
    ranks: int = 0  # to be started here; none for a finished run that only lacks its export
    profile: tuple[int, int] = (0, 0)  # first and last step to trace
    as_json: bool = False
    from_scratch: bool = False  # restart at step 0, if the run has begun
    return_to: int | None = None  # go back to the checkpoint of this step first
    command: tuple[str, ...] = ()
    given: tuple[str, ...] = LENGTH  # keys that the user gave
    threads: int | None = None  # of torch in each rank; None leaves torch's choice
    heartbeat_pipe: int | None = None  # the supervisor fills it in
    supervisor: int | None = None  # its process id; under torchrun and Slurm, that of who started this rank


class Ending(NamedTuple):
    """How the ranks ended, as far as the supervisor saw it."""

    status: int
    reason: str
    step: int
    rank_failed: bool = False


@dataclass
class Ranks:
    """What the supervisor knows of its ranks, by rank."""

    pids: dict[int, int] = field(default_factory=dict)
    beats: dict[int, float] = field(default_factory=dict)  # when the last heartbeat came
    steps: dict[int, int] = field(default_factory=dict)
    rest: bytes = b""  # of an incomplete line

    @property
    def step(self) -> int:
        """The highest step that a rank has reported."""
        return max(self.steps.values(), default=0)

    def read(self, pipe: int, now: float) -> bool:
        """Read all heartbeats in a non-blocking pipe. Return whether there were any."""
        any_read = False
        with suppress(BlockingIOError):
            while received := os.read(pipe, 65536):
                any_read = True
                *lines, self.rest = (self.rest + received).split(b"\n")
                for line in lines:
                    self.heartbeat(line.decode(), now)
        return any_read

    def heartbeat(self, line: str, now: float) -> None:
        """One line of the pipe: `rank pid step`, and `done` when the rank has nothing left but to exit."""
        rank, pid, step = (int(word) for word in line.split()[:3])
        self.pids[rank], self.beats[rank], self.steps[rank] = pid, now, step
        if line.endswith("done"):
            del self.beats[rank]

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks without a heartbeat for more than `seconds`."""
        return sorted(rank for rank, when in self.beats.items() if now - when > seconds)


@dataclass
class AwakeClock:
    """Seconds in which this process was awake: while it is stopped (SIGSTOP, `scontrol suspend`), it misses heartbeats.

    The ranks may have been stopped with it, or their heartbeats may wait in the pipe: neither is a hang.
    """

    seconds: float = 0.0
    last: float | None = None

    def tick(self, now: float) -> float:
        """`seconds` at `now`, of a monotonic clock. For every turn of a loop."""
        self.seconds += min(now - (now if self.last is None else self.last), TURN_SECONDS)
        self.last = now
        return self.seconds


@dataclass
class Signals:
    """Counts stop signals instead of obeying them."""

    received: int = 0
    last: int = signal.SIGTERM
    passed_on: int = 0
    interrupts: int = 0

    def count(self, number: int, frame: object) -> None:
        """The handler."""
        self.received, self.last = self.received + 1, for_ranks(number)
        self.interrupts += number == signal.SIGINT


def next_action(
    ranks: Ranks, signals: Signals, now: float, hang_seconds: float
) -> Literal["wait", "pass on", "end", "hung"]:
    """What the supervisor does next, given signals and heartbeats so far."""
    if signals.received > signals.passed_on:
        # Only Ctrl-C counts twice: schedulers send several signals as a matter of course.
        return "end" if signals.interrupts > 1 else "pass on"
    return "hung" if ranks.silent(now, hang_seconds) else "wait"


def ending_of(returncode: int, ranks: Ranks, *, stopping: bool) -> Ending:
    """How the ranks ended, by the exit status of the forker."""
    if stopping and not ranks.pids:
        return Ending(int(ExitStatus.STOPPED), "stopped before the first step", 0)
    status = returncode if returncode >= 0 else int(ExitStatus.FAILED)
    if status in BY_THE_RANKS:
        return Ending(status, ExitStatus(status).reason, ranks.step)
    if not ranks.pids:
        return Ending(status, "failed before training began", 0)
    return Ending(status, "a rank failed", ranks.step, rank_failed=True)


def supervise(job: Job) -> Ending:
    """Run the ranks of `job` here until they end, and write the exit reason where the ranks did not."""
    folder, signals = RunFolder.of(job.config), Signals()
    handle_stop_signals(signals.count, ABOVE_RANKS)
    before = read_exit_reason(folder)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)  # a rank drops its heartbeat rather than wait for a slow supervisor
    job = job.model_copy(update={"heartbeat_pipe": write_end, "supervisor": os.getpid()})
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER],
        stdin=subprocess.PIPE,
        pass_fds=(write_end,),
        start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone
    )
    os.close(write_end)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(job.model_dump(mode="json")).encode())  # ASCII, whatever a path has in it
    try:
        ending = _watch(process, read_end, signals, job.config.guard.hang_seconds, folder)
    finally:
        _end(process, read_end)
        handle_stop_signals(signal.SIG_IGN, ABOVE_RANKS)
        os.close(read_end)
    after = read_exit_reason(folder)
    by_ranks = after if after != before else None
    if ending.reason == INTERRUPTED and by_ranks and by_ranks.code:  # they stopped before they could be ended
        ending = ending._replace(status=by_ranks.code)
    elif ending.reason == INTERRUPTED and not by_ranks:
        saved = ending.step > 0 and (folder.checkpoints / f"step-{ending.step:08d}").is_dir()
        if saved:
            ending = ending._replace(status=int(ExitStatus.STOPPED), reason=ExitStatus.STOPPED.reason)
            write_exit_reason(folder, ending.status, ending.reason, ending.step, requeue=True)
        last = f"step {ending.step:,} is saved" if saved else "unsaved"
        command = f"minka train {quote(str(folder.path))}"
        print(f"stopped at once, {last}; `{command}` resumes from the last save", file=sys.stderr)
    if folder.exists():
        complete_exit_reason(folder, ending, by_ranks)
    return ending._replace(rank_failed=ending.rank_failed and by_ranks is None)


def complete_exit_reason(folder: RunFolder, ending: Ending, by_ranks: ExitReason | None) -> None:
    """Write the exit reason when the ranks could not. `by_ranks` is the one that they wrote in this session."""
    if ending.status in BY_THE_RANKS or (by_ranks and by_ranks.code != ExitStatus.DONE):
        return
    # Of "done", the next start would take the run for finished, and not export it.
    reason = "trained to its end and saved; then the export failed" if by_ranks else ending.reason
    hung, before = ending.status == ExitStatus.HUNG, not by_ranks and folder.finished()
    write_exit_reason(folder, ending.status, reason, ending.step, requeue=hung, finished=before)


def _watch(
    process: subprocess.Popen[bytes], pipe: int, signals: Signals, hang_seconds: float, folder: RunFolder
) -> Ending:
    ranks, clock = Ranks(), AwakeClock()
    selector = selectors.DefaultSelector()
    selector.register(pipe, selectors.EVENT_READ)
    while process.poll() is None:
        selector.select(timeout=0.2)
        now = clock.tick(time.monotonic())
        ranks.read(pipe, now)
        match next_action(ranks, signals, now, hang_seconds):
            case "pass on":
                if not signals.passed_on:
                    print("stopping after this step; Ctrl-C again to stop at once, unsaved", file=sys.stderr)
                signals.passed_on = signals.received
                process.send_signal(signals.last)  # it passes the signal on to its children
            case "end":
                os.killpg(process.pid, signal.SIGKILL)  # SIGTERM would have the ranks save
                return Ending(int(ExitStatus.FAILED), INTERRUPTED, ranks.step)
            case "hung":
                silent = ", ".join(map(str, ranks.silent(now, hang_seconds)))
                reason = f"no heartbeat from rank {silent} for {hang_seconds:g} s"
                missing = ", ".join(map(str, _ask_for_stacks(ranks, folder)))
                said = f"; rank {missing} did not answer, as if it were stopped" if missing else ""
                print(f"minka: {reason}. The stacks of all ranks are in {folder.logs}{said}.", file=sys.stderr)
                return Ending(int(ExitStatus.HUNG), reason, ranks.step)
    ranks.read(pipe, clock.seconds)
    if signals.passed_on and not ranks.pids:
        print("stopped before the first step: there was nothing to save", file=sys.stderr)
    return ending_of(process.returncode, ranks, stopping=signals.passed_on > 0)


def _ask_for_stacks(ranks: Ranks, folder: RunFolder) -> list[int]:
    """Have all ranks write their stacks. Return those that have not."""
    files = {rank: folder.logs / f"stacks-{rank:05d}.txt" for rank in sorted(ranks.pids)}
    sizes = {rank: file.stat().st_size for rank, file in files.items() if file.exists()}
    for pid in ranks.pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    time.sleep(1.0)  # for the stacks to be written
    return [rank for rank, file in files.items() if not file.exists() or file.stat().st_size == sizes.get(rank, 0)]


def _end(process: subprocess.Popen[bytes], pipe: int) -> None:
    """End all processes of the forker's session. Ranks save at SIGTERM, and are killed when no heartbeat comes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    ranks, clock, last = Ranks(), AwakeClock(), 0.0
    while process.poll() is None:
        now = clock.tick(time.monotonic())
        last = now if ranks.read(pipe, now) else last
        if now - last > KILL_SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
