"""The mesh: the only place that starts torch.distributed. Everything else is handed a Mesh and asks it by axis name."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minka.parallel.local_device import find_topology, local_device
from minka.plan.errors import ExitStatus, UserError
from minka.plan.execution_choices import compute_dtype_name
from minka.plan.layout import Layout
from minka.plan.topology import Topology, canonical, check, coordinates

SAVE_TIMEOUT = timedelta(days=1)  # of groups for saves, which a slow disk must not break; the supervisor sees a hang
END_SECONDS = 10.0  # for every rank to learn that the first one has failed
MESSAGE_BYTES = 500  # of an error that one rank sends to all
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# data = shard x context: FSDP cuts weights over the ranks of a sequence too, which have different tokens of it.
MESH_AXES = ("pipeline", "replicate", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks.

    `axes` has MESH_AXES; it is None for a single rank without a process group: then every collective is the identity.
    `rank` is a position: it counts along AXES, tensor fastest, and is not the number that the launcher gave.
    """

    layout: Layout
    device: torch.device
    rank: int
    axes: DeviceMesh | None
    host: Any = None  # the process group of sum_on_host; None is the default one
    context: Any = None  # the group of the ranks that share a sequence, in order; None without context parallelism
    topology: Topology | None = None  # None for a single rank without a process group

    @property
    def ranks(self) -> int:
        return self.layout.world

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations and products on this rank's device."""
        return DTYPES[compute_dtype_name(self.layout, self.device.type)]

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of losses, norms and logits."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def coordinate(self) -> Mapping[str, int]:
        """This rank's place on each of AXES."""
        return coordinates(self.layout, self.rank)

    @property
    def data_rank(self) -> int:
        """Which part of each batch is this rank's, among layout.data_ways."""
        return self.coordinate["replicate"] * self.layout.shard + self.coordinate["shard"]

    @property
    def leads_data(self) -> bool:
        """Whether this rank counts its part of each batch; other ranks hold the same samples."""
        at = self.coordinate
        return not (at["pipeline"] or at["context"] or at["tensor"])

    @property
    def leads_tensor(self) -> bool:
        """Whether a number that is equal on all ranks of a tensor group is counted here."""
        return not self.coordinate["tensor"]

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

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
        return tensor.tolist()

    def first_error(self, problem: str) -> str:
        """This rank's problem, or that of the first rank that has one; empty when none has. Collective.

        Rank 0 writes the ledger, and must name a file that only a different rank could not read.
        """
        (count,) = self.sum_on_host([bool(problem)])
        if not count:
            return ""
        having = self.sum_on_host([bool(problem) and rank == self.rank for rank in range(self.ranks)])
        first = having.index(1)
        mine = problem.encode()[:MESSAGE_BYTES] if self.rank == first else b""
        message = bytes(self.sum_on_host(list(mine.ljust(MESSAGE_BYTES, b"\0")))).rstrip(b"\0").decode(errors="replace")
        return problem or f"rank {first}: {message}"

    def with_own_host_group(self) -> "Mesh":
        """The same mesh with a separate group for sum_on_host, for a thread alongside the training. Collective."""
        return self if self.axes is None else replace(self, host=dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.sum_on_host([0])


@contextmanager
def start_mesh(
    layout: Layout,
    *,
    casts: bool = False,
    timeout_seconds: float = 600.0,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Mesh]:
    """Join the process group that the environment describes and lay the mesh over it.

    Reads RANK, LOCAL_RANK and WORLD_SIZE (absent: one rank), and either MINKA_STORE, a file for this run alone, or
    MASTER_ADDR and MASTER_PORT. MINKA_HOST names this host, where its own name is not unique. casts: weights are not in
    the compute dtype even where that is fp32. Raises UserError when the layout does not fit the ranks, or their places.
    The mesh's first rank calls `prepare` once all ranks have met; the others wait as long as it works, and end with its
    exit status where it fails.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    layout = layout.resolve(ranks)
    device = local_device()
    if prepare and ranks == 1:
        prepare()
    # What casts weights is FSDP2, and DeepSpeed always asks for a group.
    casts = casts or layout.precision == "bf16"
    if ranks == 1 and device.type == "cpu" and not casts and layout.engine == "fsdp":
        yield Mesh(layout, device, 0, None)
        return
    timeout = timedelta(seconds=timeout_seconds)
    if ranks == 1:  # no other rank connects, so any free port will do
        store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    else:
        file = os.environ.get("MINKA_STORE")
        url = f"file://{file}" if file else "env://"
        store, _, _ = next(iter(dist.rendezvous(url, rank, ranks, timeout=timeout)))  # type: ignore[attr-defined]
        store.set_timeout(timeout)
    topology = find_topology(store, ranks, rank, device)
    check(layout, topology)
    rank = [place.rank for place in canonical(topology.places)].index(rank)  # from here on a position on the mesh
    if prepare and ranks > 1:
        _first_prepares(prepare, store, rank, ranks, timeout_seconds)
    dist.init_process_group(
        **backends(device),
        timeout=timeout,
        rank=rank,
        world_size=ranks,
        store=dist.PrefixStore("mesh", store),  # type: ignore[attr-defined]
    )
    try:
        mesh = replace(lay_mesh(layout, device, rank), topology=topology)
        mesh.barrier()  # a rank that ends early must not disconnect from one that is still connecting
        yield mesh
    finally:
        dist.destroy_process_group()


def backends(device: torch.device) -> dict[str, Any]:
    """Which backends a process group has, and the device that it is bound to.

    Bound to a GPU, NCCL makes its communicator at the start, and those of all groups by splitting it. Otherwise each is
    made where it is first used, which in a pipeline is a moment when ranks wait for each other.
    """
    if device.type == "cuda":
        return {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    return {"backend": "gloo"}


def lay_mesh(layout: Layout, device: torch.device, rank: int) -> Mesh:
    """The mesh over the current process group, whose ranks are positions, in the mesh's order. Collective."""
    ranks = torch.arange(layout.world)
    shape = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
    axes = DeviceMesh(device.type, ranks.view(shape), mesh_dim_names=MESH_AXES)
    context = None
    if layout.context > 1:
        rows = ranks.view(-1, layout.context, layout.tensor).transpose(1, 2).reshape(-1, layout.context)
        context, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return Mesh(layout, device, rank, axes, context=context)


def _first_prepares(prepare: Callable[[], None], store: Any, rank: int, ranks: int, silence: float) -> None:
    """`prepare` on the first rank, which counts in the store while it works; the others watch the count.

    There is no process group yet: its collectives would time out long before a large corpus is ready. Raises
    RuntimeError when the first rank is silent for `silence` seconds: it was killed.
    """
    if rank:
        status = _await_first(store, silence)
        if status:
            _end_together(store, ranks)
            raise SystemExit(status)
        return
    ended, status = threading.Event(), int(ExitStatus.FAILED)

    def count() -> None:
        while not ended.wait(silence / 20):
            store.add("preparing", 1)

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        prepare()
        status = 0
    except UserError as error:
        status = int(error.status)
        raise
    finally:
        ended.set()
        counter.join()
        store.set("prepared", str(status))
        if status:
            _end_together(store, ranks)


def _await_first(store: Any, silence: float) -> int:
    """The exit status of the first rank's preparation, once it has ended; 0 where it succeeded."""
    pause, count, changed = 0.02, 0, time.monotonic()
    while not store.check(["prepared"]):
        time.sleep(pause)
        pause = min(2 * pause, 2.0)  # thousands of ranks ask one process
        before, count = count, store.add("preparing", 0)
        changed = changed if count == before else time.monotonic()
        if time.monotonic() - changed > silence:
            raise RuntimeError(f"the first rank has not prepared the run, and has given no sign for {silence:g} s")
    return int(store.get("prepared"))


def _end_together(store: Any, ranks: int) -> None:
    """Say that this rank ends. The one that serves the store, or may, waits until all have said it."""
    known, until = store.add("ending", 1), time.monotonic() + END_SECONDS
    while os.environ["RANK"] == "0" and known < ranks and time.monotonic() < until:
        time.sleep(0.1)
        known = store.add("ending", 0)
