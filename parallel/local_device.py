"""Which GPU is this rank's, and where all ranks are: from what the launcher says, and what each rank sees."""

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from minka.plan.errors import UserError
from minka.plan.hardware import nvlink_domain
from minka.plan.topology import Place, Topology


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = device_index(local_rank(), torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def local_rank() -> int:
    """This rank's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_index(local: int, visible: int) -> int:
    """Which of the visible GPUs is that of local rank `local`. Raises UserError where there is none for it.

    A launcher may show each rank its own GPU alone (srun --gpus-per-task=1), which is then its number 0.
    """
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"LOCAL_RANK is {local}, and {visible} GPUs are visible",
            where=socket.gethostname(),
            why="every rank needs its own GPU",
            remedy="start at most one rank a GPU (srun --ntasks-per-node, torchrun --nproc-per-node)",
        )
    return local


def find_topology(store: Any, ranks: int, rank: int, device: torch.device) -> Topology:
    """Host and local rank of every rank, as each reports its own. Collective.

    It goes through the store, since the order of the process group's ranks follows from it. The first rank collects
    all reports, or each rank would ask the store for each other's.
    """
    host = os.environ.get("MINKA_HOST") or socket.gethostname()
    mine: list[Any] = [host, local_rank(), 0, "", ""]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        mine[2:] = [torch.cuda.device_count(), gpu.name, str(gpu.uuid)]
    store.set(f"place/{rank}", json.dumps(mine))
    if rank == 0:
        store.set("places", json.dumps([json.loads(store.get(f"place/{number}")) for number in range(ranks)]))
    return topology_of(json.loads(store.get("places")))


def topology_of(reports: Sequence[tuple[str, int, int, str, str]]) -> Topology:
    """From (host, local rank, visible GPUs, name and id of its GPU) of every rank; the last three empty on a CPU.

    Where each rank sees its own GPU alone, the host has at least as many as ranks. Ranks with one GPU have one place,
    which plan/topology.py refuses.
    """
    ranks, seen, places, found = Counter(report[0] for report in reports), dict[tuple[str, str], int](), [], []
    for number, (host, local, visible, name, gpu) in enumerate(reports):
        places.append(Place(host, seen.setdefault((host, gpu), local) if gpu else local, number))
        gpus = max(visible, ranks[host]) if visible else 0
        found.append((gpus, nvlink_domain(name, gpus) if gpus else 0))
    return Topology(tuple(places), min(domain for _, domain in found), max(gpus for gpus, _ in found))
