"""The mesh: the only place that starts torch.distributed. Everything else is handed a Mesh and asks it by axis name."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minka.plan.layout import AXES, Layout

# Of the groups beside the training: a slow disk is no reason to break one. A rank that died is noticed at once, and one
# that hangs by the supervisor.
PATIENCE = timedelta(days=1)
# FSDP cuts weights over the ranks of a sequence's parts too: they hold the same weights and other tokens.
MESH_AXES = ("pipeline", "replicate", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the others.

    `axes` has MESH_AXES, where data = shard x context; it is None for a single rank without a process group: then every
    collective is the identity. `position` counts along AXES, tensor fastest; it need not be the launcher's rank.
    """

    layout: Layout
    device: torch.device
    rank: int
    axes: DeviceMesh | None
    host: Any = None  # the process group of sum_on_host; None is the default one
    context: Any = None  # the process group of the ranks that share a sequence, in order; None where nobody does
    position: int = -1

    @property
    def ranks(self) -> int:
        """World size."""
        return self.layout.world

    @property
    def coordinate(self) -> Mapping[str, int]:
        """This rank's place on each of AXES."""
        left, found = self.position if self.position >= 0 else self.rank, {}
        for axis in reversed(AXES):
            left, found[axis] = divmod(left, getattr(self.layout, axis))
        return found

    @property
    def data_rank(self) -> int:
        """Which part of each batch is this rank's, among layout.data_ways."""
        return self.coordinate["replicate"] * self.layout.shard + self.coordinate["shard"]

    @property
    def leads_data(self) -> bool:
        """Whether this rank speaks for its part of each batch; others hold the same samples."""
        at = self.coordinate
        return not (at["pipeline"] or at["context"] or at["tensor"])

    @property
    def leads_tensor(self) -> bool:
        """Whether a number that all ranks of a tensor group have alike is counted here."""
        return not self.coordinate["tensor"]

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
        mesh = lay_mesh(layout, device, rank, range(ranks))
        mesh.barrier()  # a rank that is done early must not hang up on one that is still connecting
        yield mesh
    finally:
        dist.destroy_process_group()


def lay_mesh(layout: Layout, device: torch.device, rank: int, order: Sequence[int]) -> Mesh:
    """The mesh over the process group that is there; `order` gives the launcher's rank at each position. Collective."""
    ranks = torch.tensor(list(order), dtype=torch.int64)
    shape = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
    axes = DeviceMesh(device.type, ranks.view(shape), mesh_dim_names=MESH_AXES)
    context = None
    if layout.context > 1:
        rows = ranks.view(-1, layout.context, layout.tensor).transpose(1, 2).reshape(-1, layout.context)
        context, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return Mesh(layout, device, rank, axes, context=context, position=list(order).index(rank))


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
