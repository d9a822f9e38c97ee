"""`minka doctor --machine FILE`: this machine's rates, for `minka plan --gpu FILE`. Seconds, on its own cores."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from minka.launch.environment import usable_cpus
from minka.plan.cluster import Cluster
from minka.plan.errors import UserError
from minka.plan.rates import Rates
from minka.train.provenance import processor

SIDE = 1024  # of the matrices: their product is large enough for the full rate of a core
COPIED = 2**26  # bytes: more than the caches hold
GATHERED = 2**24  # bytes of a collective
NARROW, WIDE, ROWS = 64, 4096, 256  # much work on a rank, and few bytes between them
REPEATS, MESSAGES = 7, 60
SECONDS = 120.0  # until a worker is given up


def measure_machine() -> Cluster:
    """Return this machine's cores as a device that a plan can use. Raises UserError where that fails.

    A rank uses one core. Products and copies are measured on one core alone, products also on all at once: cores that
    share a unit are slower then. Collectives are measured between as many processes.
    """
    cores = usable_cpus()
    ranks = max(2, cores)
    with tempfile.TemporaryDirectory(prefix="minka-cluster-") as folder:
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        workers = [context.Process(target=_work, args=(rank, ranks, folder, answers)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            if worker.exitcode is None:
                worker.terminate()
        if any(worker.exitcode for worker in workers) or answers.empty():
            what = "the measurement failed: a process ended early"
            raise UserError(what, where="--machine", remedy="run it again on a quiet machine")
        found = answers.get()
    return Cluster(
        name=processor(),
        peak_tflops=found["flops"] / 1e12,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks / 1e9, 2),
        bandwidth_tb=found["bytes"] / 1e12,
        link_gb=found["gathered"] / 1e9,
        domain=2**20,
        host_gpus=2**20,
        cores=cores,
        together=found["together"],
        source="measured on this machine by `minka doctor --machine`",
        rates=Rates(link=1.0, message_seconds=found["message"], exposed=1.0, layer_seconds=0.002),
    )


def _work(rank: int, ranks: int, folder: str, answers: Any) -> None:
    torch.set_num_threads(1)
    store = FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS))
    try:
        left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
        here, there = torch.zeros(COPIED // 4), torch.zeros(COPIED // 4)
        alone: dict[str, float] = {}
        if rank == 0:
            alone = {"product": _seconds(lambda: left @ right), "copy": _seconds(lambda: there.copy_(here))}
        dist.barrier()
        together = _seconds(lambda: left @ right)
        dist.barrier()
        part = torch.zeros(GATHERED // ranks // 4)
        whole = [torch.zeros_like(part) for _ in range(ranks)]
        gather = _seconds(lambda: dist.all_gather(whole, part))
        message = _message(ranks)
        if rank == 0:
            answers.put(
                {
                    "flops": 2 * SIDE**3 / alone["product"],
                    "bytes": 2 * COPIED / alone["copy"],
                    "together": max(1.0, together / alone["product"]),
                    "gathered": GATHERED * (ranks - 1) / ranks / gather,
                    "message": max(message, 1e-5),
                }
            )
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _message(ranks: int) -> float:
    """Seconds that a collective costs a tensor group on top of its bytes.

    As in a block: cores are busy when it begins, its threads wait for one, and the host has to call it.
    """

    def feed_forward(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(NARROW, width, bias=False), nn.Linear(width, NARROW, bias=False))

    cut = feed_forward(WIDE * ranks)
    plan = {"0": ColwiseParallel(input_layouts=Shard(0)), "1": RowwiseParallel(output_layouts=Shard(0))}
    parallelize_module(cut, init_device_mesh("cpu", (ranks,)), plan)
    seconds = []
    for module, rows in ((cut, ROWS // ranks), (feed_forward(WIDE), ROWS)):
        x = torch.randn(rows, NARROW, requires_grad=True)
        # The mean: some wait long for a core, and a step for each of them.
        seconds.append(_seconds(partial(_there_and_back, module, x), MESSAGES, statistics.mean))
    return (seconds[0] - seconds[1]) / 4  # one and one in each direction


def _there_and_back(module: nn.Module, x: torch.Tensor) -> None:
    module(x).sum().backward()


def _seconds(
    once: Callable[[], object], repeats: int = REPEATS, of: Callable[[list[float]], float] = statistics.median
) -> float:
    once()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return of(taken)
