"""Who starts the ranks, and how many: decided by the environment variables and the GPUs of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path

from minka.plan.errors import UserError

CPU_RANKS = 2


def launcher(environment: Mapping[str, str]) -> str | None:
    """Who started this process as one rank of several: torchrun, slurm, or None."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun"
    # A batch script has only the first of these, and a shell started by srun is a step with one task.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _slurm_tasks(environment) > 1:
        return "slurm"
    return None


def requeued(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler or torchrun has repeated this command by itself."""
    counts = (environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a rank, from those that srun gives each task."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(_slurm_tasks(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        # All tasks must choose the same port without communication: from the job's and step's numbers.
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20_000 + (int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])) % 40_000),
    }


def first_host(hosts: str) -> str:
    """The first name of a Slurm host list: "node[07-09,12],login1" gives node07."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    if match is None:
        raise UserError(f"{hosts!r} is not a Slurm host list", where="SLURM_JOB_NODELIST")
    return "".join(part or "" for part in match.groups())


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that this process may use, counted without torch."""
    gpus = [p for p in devices.glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not gpus:
        return len(gpus)
    return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])


def choose_ranks(asked: int | None, gpus: int) -> int:
    """How many ranks to start here: `asked`, else one a GPU, else two. Raises UserError where that is not possible."""
    if asked is not None and asked < 1:
        raise UserError(f"--ranks {asked}: at least one rank is needed", remedy="leave it out, or give 1 or more")
    if asked is not None and gpus and asked > gpus:
        raise UserError(
            f"--ranks {asked}: there are {gpus} GPUs here",
            why="every rank needs its own GPU",
            remedy=f"give at most {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    return asked or gpus or CPU_RANKS


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
