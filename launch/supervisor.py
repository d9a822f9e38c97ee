"""The supervisor: owns the ranks of this machine and never imports torch.

It starts one process that imports torch once and forks the ranks (train/forker.py), hands on signals, reads the ranks'
heartbeats from a pipe, dumps stacks and ends everything when one stops beating, and decides the exit status.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from minka.launch.exit_reason import Ending, read_ending, write_ending
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.run_folder import RunFolder

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # each asks the ranks to save and stop
STACKS_SIGNAL = signal.SIGUSR2
CPU_RANKS = 2
KILL_SECONDS = 5.0
A_RANK_FAILED = "a rank failed"
IN_GOOD_ORDER = (ExitStatus.DONE, ExitStatus.REFUSED, ExitStatus.STOPPED, ExitStatus.NEEDS_PERSON)


def joined(environment: Mapping[str, str]) -> str | None:
    """Who started this process as one rank of many: torchrun, slurm, or nobody."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun"
    # A batch script has the first of these alone, and a shell that srun started is a step of one task.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        return "slurm"
    return None


def restarted(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler or torchrun starts this command again by itself."""
    counts = (environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's names for a rank's place, from those srun gives each task."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(_slurm_tasks(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        # Every task must choose the same port without talking: the job's and step's numbers, above the reserved ports.
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20_000 + (int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])) % 40_000),
    }


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)


def first_host(hosts: str) -> str:
    """The first name of a Slurm host list: "node[07-09,12],login1" gives node07."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    if match is None:
        raise UserError(f"{hosts!r} is no Slurm host list", where="SLURM_JOB_NODELIST")
    return "".join(part or "" for part in match.groups())


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use, without asking torch."""
    gpus = [p for p in devices.glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not gpus:
        return len(gpus)
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def choose_ranks(asked: int | None, gpus: int) -> int:
    """How many ranks to start here: as asked, else one a GPU, else two. Raises UserError when that cannot be."""
    if asked is not None and asked < 1:
        raise UserError(f"--ranks {asked}: at least one rank is needed", remedy="leave it out, or give 1 or more")
    if asked is not None and gpus and asked > gpus:
        raise UserError(
            f"--ranks {asked}: there are {gpus} GPUs here",
            why="every rank needs a GPU of its own",
            remedy=f"give at most {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    return asked or gpus or CPU_RANKS


def parse_window(window: str) -> tuple[int, int]:
    """ "10:13" as (10, 13): three steps, the eleventh to the thirteenth; "" as (0, 0). Raises UserError."""
    first, colon, last = window.partition(":")
    if not window:
        return 0, 0
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"{window!r} is no window of steps", where="--profile", remedy="for example --profile 10:13")
    return int(first), int(last)


@dataclass
class Ranks:
    """What the supervisor knows of its ranks: pids, and when each was last heard of."""

    pids: dict[int, int] = field(default_factory=dict)
    heard: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    rest: bytes = b""  # of a line that is not whole yet

    def listen(self, beats: int) -> None:
        """Whatever there is in a pipe that does not block."""
        with suppress(BlockingIOError):
            while said := os.read(beats, 65536):
                *lines, self.rest = (self.rest + said).split(b"\n")
                for line in lines:
                    self.hear(line.decode(), time.monotonic())

    def hear(self, line: str, now: float) -> None:
        """One line of the pipe: `rank pid step`, and `done` behind it when the rank has only to end."""
        rank, pid, step = (int(word) for word in line.split()[:3])
        self.pids[rank], self.heard[rank], self.steps[rank] = pid, now, step
        if line.endswith("done"):
            del self.heard[rank]

    def silent(self, now: float, seconds: float) -> list[int]:
        """Ranks not heard of for so long."""
        return sorted(rank for rank, when in self.heard.items() if now - when > seconds)


def supervise(
    config: RunConfig, ranks: int, profile: str, from_scratch: bool, as_json: bool, saved_step: Callable[[], int | None]
) -> int:
    """Run `ranks` ranks of `config` here and give the exit status of the whole.

    `saved_step` tells the step of the newest checkpoint, or None: where the run can resume from after a rank failed.
    """
    folder, handing = RunFolder.of(config), _Handing()
    before = read_ending(folder)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)  # a rank never waits for a slow supervisor: it drops the beat
    job = {
        "config": config.model_dump(mode="json"),
        "ranks": ranks,
        "profile": profile,
        "json": as_json,
        "beat": write_end,
        "parent": os.getpid(),
        "command": sys.argv,
        "from_scratch": from_scratch,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "minka.train.forker"],
        stdin=subprocess.PIPE,
        pass_fds=(write_end,),
        start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
        text=True,
    )
    os.close(write_end)
    assert process.stdin is not None
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    try:
        with os.fdopen(read_end) as beats:
            status, reason, step = _watch(process, beats.fileno(), handing, config.guard.hang_seconds, folder)
    finally:
        _end(process)
        handing.leave()
    after = read_ending(folder)
    told = after if after != before else None
    if reason == A_RANK_FAILED and not told:
        saved, again = saved_step(), f"`minka train {folder.path}`"
        onward = f"{again} begins again: nothing was saved" if saved is None else f"{again} goes on from step {saved:,}"
        print(f"minka: training has ended, since a rank failed. {onward}.", file=sys.stderr)
    if folder.exists():
        tell_ending(folder, status, reason, step, told)
    return status


def tell_ending(folder: RunFolder, status: int, reason: str, step: int, told: Ending | None) -> None:
    """The ranks write the reason of an end in good order; of any other end only the supervisor can tell.

    `told` is what they have written in this session.
    """
    if status in IN_GOOD_ORDER or (told and told.code != ExitStatus.DONE):
        return
    if told:  # or the next start would take the run for finished, and not export it
        reason = "trained to its end and saved; what comes after that failed: the export"
    write_ending(folder, status, reason, step, requeue=status == ExitStatus.HUNG)


class _Handing:
    """From here on signals are counted instead of obeyed, to the process's end: a late one must not undo an ending."""

    def __init__(self) -> None:
        self.received = self.interrupts = 0
        for number in HANDED_ON:
            signal.signal(number, self._count)

    def leave(self) -> None:
        """Python puts its own handlers back while it ends, but leaves ignored signals ignored."""
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_IGN)

    def _count(self, number: int, frame: object) -> None:
        self.received += 1
        self.interrupts += number == signal.SIGINT


def _watch(
    process: "subprocess.Popen[str]", beats: int, handing: _Handing, hang_seconds: float, folder: RunFolder
) -> tuple[int, str, int]:
    ranks, handed = Ranks(), 0
    selector = selectors.DefaultSelector()
    selector.register(beats, selectors.EVENT_READ)
    while process.poll() is None:
        if selector.select(timeout=0.2):
            ranks.listen(beats)
        if handing.received > handed:
            if handing.interrupts > 1:  # a person at a terminal; schedulers send several signals as a matter of course
                print(f"stopped at once, unsaved; `minka train {folder.path}` goes on from the last checkpoint")
                return int(ExitStatus.FAILED), "interrupted twice", max(ranks.steps.values(), default=0)
            if not handed:
                print("stopping after this step; Ctrl-C once more to stop at once, unsaved", file=sys.stderr)
            handed = handing.received
            process.terminate()  # it hands the wish on to whatever it has started
        silent = ranks.silent(time.monotonic(), hang_seconds)
        if silent:
            _signal(ranks, STACKS_SIGNAL)
            time.sleep(1.0)  # for the stacks to be written
            reason = f"no heartbeat from rank {', '.join(map(str, silent))} for {hang_seconds:g} s"
            print(f"minka: {reason}. The stacks of all ranks are in {folder.logs}.", file=sys.stderr)
            return int(ExitStatus.HUNG), reason, max(ranks.steps.values(), default=0)
    ranks.listen(beats)  # what was said last
    if handed and not ranks.pids:
        print("stopped before the first step: there was nothing to save", file=sys.stderr)
        return int(ExitStatus.STOPPED), "stopped before the first step", 0
    status = process.returncode if process.returncode >= 0 else int(ExitStatus.FAILED)
    reasons = {0: "done", 85: "stopped and saved", 86: "stopped by a rule", 2: "refused"}
    failed = A_RANK_FAILED if ranks.pids else "failed before training began"
    return status, reasons.get(status, failed), max(ranks.steps.values(), default=0)


def _signal(ranks: Ranks, number: signal.Signals) -> None:
    for pid in ranks.pids.values():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _end(process: "subprocess.Popen[str]") -> None:
    """End the whole session that was started, gently and then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
