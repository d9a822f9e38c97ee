"""Who starts the ranks, and how many: decided by the environment variables and the GPUs of this machine."""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from minka.plan.errors import UserError

CPU_RANKS = 2


def launcher(environment: Mapping[str, str]) -> str | None:
    """Who started this process as one rank of several: torchrun, slurm, or None."""
    names = ("RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if environment.get(name)}
    if given:
        _check_rank(environment, *(name for name in names if name not in given))
        return "torchrun"
    # A batch script has only the first of these, and a shell started by srun is a step with one task.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        return "slurm"
    return None


def check_one_process(environment: Mapping[str, str], what: str) -> None:
    """Raise UserError where torchrun's variables say that this is one process of several, or make no sense."""
    # Several tasks of srun may have been given different work.
    if launcher(environment) == "torchrun" and environment["WORLD_SIZE"].strip() != "1":
        remedy = "start it without torchrun, or unset RANK and WORLD_SIZE"
        raise UserError(f"{what} runs in one process, and this one is of several", where="WORLD_SIZE", remedy=remedy)


def _check_rank(environment: Mapping[str, str], *missing: str) -> None:
    """Raise UserError where torch could not start a rank from these variables, or would wait forever."""
    remedy = "start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE: minka then starts its own"
    if missing:
        what = "it is not set, though other variables say that this process is one rank of several"
        raise UserError(what, where=missing[0], remedy=remedy)
    ranks = _count(environment, "WORLD_SIZE", 1, remedy=remedy)
    _count(environment, "RANK", 0, ranks - 1, remedy)
    if ranks > 1:
        _count(environment, "LOCAL_RANK", 0, ranks - 1, remedy)
        if not environment.get("MINKA_STORE"):
            _count(environment, "MASTER_PORT", 1, 65_535, remedy)
            if not environment.get("MASTER_ADDR"):
                raise UserError("it is not set: the ranks cannot find each other", where="MASTER_ADDR", remedy=remedy)


def _count(
    environment: Mapping[str, str], name: str, least: int, most: int = 2**31 - 1, remedy: str = "unset or correct it"
) -> int:
    value = environment.get(name, "").strip()
    if not (value.isascii() and value.isdigit() and least <= int(value) <= most):
        raise UserError(f"{value!r} is not a number from {least} to {most}", where=name, remedy=remedy)
    return int(value)


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: its affinity, where the system has one, and the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()  # cgroup v2; "max": no limit
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def threads_per_rank(environment: Mapping[str, str], ranks: int, cpus: int) -> int:
    """How many threads torch gets in each of the `ranks` of this machine. OMP_NUM_THREADS decides where it is set."""
    outer, *_ = environment.get("OMP_NUM_THREADS", "").split(",")  # the rest is for nested regions
    if outer.strip() in ("", "0"):
        return max(1, cpus // ranks)
    remedy = "set it to the number of threads of each rank, or unset it"
    return _count({"OMP_NUM_THREADS": outer}, "OMP_NUM_THREADS", 1, remedy=remedy)


def requeued(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler or torchrun has repeated this command by itself."""
    counts = (environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def job_name(environment: Mapping[str, str]) -> str:
    """Which job of a scheduler, or which torchrun, starts this process again under the same name; empty outside one."""
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        return f"{socket.gethostname()} {os.getppid()} {environment.get('TORCHELASTIC_RUN_ID', '')}"
    return environment.get("SLURM_JOB_ID", "")


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a rank, from those that srun gives each task. Raises UserError naming one that is wrong."""
    tasks, remedy = _slurm_tasks(environment), "start the ranks with srun, which sets it, or with torchrun"
    job, step = (_count(environment, name, 0, 2**32 - 1, remedy) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": str(_count(environment, "SLURM_PROCID", 0, tasks - 1, remedy)),
        "LOCAL_RANK": str(_count(environment, "SLURM_LOCALID", 0, tasks - 1, remedy)),
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")),
        # All tasks must choose the same port without communication: from the job's and step's numbers.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + (job * 31 + step) % 40_000),
    }


def first_host(hosts: str) -> str:
    """The first name of a Slurm host list: "node[07-09,12],login1" gives node07."""
    match = re.match(r"(?:[^\[\],]|\[[^\]]+\])+", hosts)
    if match is None:
        raise UserError(f"{hosts!r} is not a Slurm host list", where="SLURM_JOB_NODELIST")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use, counted without torch."""
    gpus = [p for p in devices.glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not gpus:
        return len(gpus)
    valid = list(takewhile(lambda name: _is_device(name, len(gpus)), map(str.strip, visible.split(","))))
    return min(len(valid), 1) if any(name.startswith("MIG-") for name in valid) else len(valid)


def _is_device(name: str, gpus: int) -> bool:
    """Whether CUDA takes `name`; it ignores all names after one that it does not take. Of MIG devices it uses one."""
    return name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < gpus)


def choose_ranks(asked: int | None, gpus: int) -> int:
    """How many ranks to start here: `asked`, else one a GPU, else two. Raises UserError where that is not possible."""
    if asked and gpus and asked > gpus:
        raise UserError(
            f"--ranks {asked}: there are {gpus} GPUs here, and every rank needs its own",
            remedy=f"give at most {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    return asked or gpus or CPU_RANKS


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    names = (name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if environment.get(name))
    name = next(names, None)
    return _count(environment, name, 1) if name else 1
