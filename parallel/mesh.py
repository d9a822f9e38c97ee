"""The mesh: the only place that starts torch.distributed. Everything else is handed a Mesh and asks it by axis name."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minka.plan.layout import Layout

# Of the groups beside the training: a slow disk is no reason to break one. A rank that died is noticed at once, and one
# that hangs by the supervisor.
PATIENCE = timedelta(days=1)
MESH_AXES = ("replicate", "shard")


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the others.

    `axes` is None for a single rank without a process group: then every collective is the identity.
    """

    layout: Layout
    device: torch.device
    rank: int
    axes: DeviceMesh | None
    host: Any = None  # the process group of sum_on_host; None is the default one

    @property
    def ranks(self) -> int:
        """World size."""
        return self.layout.world

    @property
    def data_rank(self) -> int:
        """Which part of each batch is this rank's, among layout.data_ways."""
        return self.rank  # replicate and shard are the whole mesh so far

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def needs_sum_on_gloo(self) -> bool:
        """gloo has no pre-multiplied sum, which FSDP2 would use for a divide factor of its own."""
        return self.device.type == "cpu"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a device tensor over all ranks, in place."""
        if self.axes is not None:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        """Sum small integers over all ranks without touching the device (gloo)."""
        if self.axes is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.host)
        return [int(n) for n in tensor.tolist()]

    def beside(self) -> "Mesh":
        """The same mesh with a group of its own for sum_on_host, for a thread beside the training. Collective."""
        return self if self.axes is None else replace(self, host=dist.new_group(backend="gloo", timeout=PATIENCE))

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.sum_on_host([0])


@contextmanager
def start_mesh(layout: Layout, *, timeout_seconds: float = 600.0) -> Iterator[Mesh]:
    """Join the process group that the environment describes and lay the mesh over it.

    Reads RANK, LOCAL_RANK and WORLD_SIZE (absent: one rank), and either MINKA_STORE, a file that nobody else uses, or
    MASTER_ADDR and MASTER_PORT. Raises UserError when the layout does not fit the number of ranks.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    layout = layout.resolve(ranks)
    device = local_device()
    if ranks == 1 and device.type == "cpu" and layout.precision != "bf16":  # bf16 compute is FSDP2's mixed precision
        yield Mesh(layout, device, 0, None)
        return
    store = os.environ.get("MINKA_STORE")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        rank=rank,
        world_size=ranks,
        init_method=None if ranks == 1 else f"file://{store}" if store else "env://",
        store=_lone_store() if ranks == 1 else None,
    )
    try:
        axes = init_device_mesh(device.type, (layout.replicate, layout.shard), mesh_dim_names=MESH_AXES)
        mesh = Mesh(layout, device, rank, axes)
        mesh.barrier()  # a rank that is done early must not hang up on one that is still connecting
        yield mesh
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _lone_store() -> Any:
    """For a single rank: nobody to meet, so any free port will do. (Public; torch's type stubs do not export it.)"""
    return dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
