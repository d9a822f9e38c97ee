"""One rank's part of a run of any size, built and stepped without its memory and without its peers.

The build is training's own, under torch's fake process group and on fake tensors, which have shapes and no numbers. So
are forward, backward and update; what they would hold and send is written down as it is of a real step.

`as_gpu` takes what a GPU would take of the ways that our operations know: bf16, variable-length attention, the fused
RMS norm, larger chunks of logits. The tensors are fake CPU tensors all the same: autograd asks for a device's driver
even where tensors are fake. Blocks run eagerly; compiled, they hold less workspace and choose what they save.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minka.parallel.apply import cut
from minka.parallel.fsdp_engine import ShardedEngine
from minka.parallel.memory_trace import MemoryTrace, Peak
from minka.parallel.mesh import Mesh, lay_mesh
from minka.parallel.pieces import Piece
from minka.parallel.pipeline_engine import PipelineEngine
from minka.parallel.traffic import Traffic, Transfer
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import Asked, Layout, micro_batches, micro_batches_refused
from minka.plan.topology import coordinates
from minka.train.build_engine import engine_over
from minka.train.dry_run_fakes import AssumedFeeder, alone, fakes, gpu_ways, without_numbers
from minka.train.guard import accepts
from minka.train.optimizer import AdamW

TRACED_LAYERS = 300  # of a pipeline: layers of a rank times micro-batches that take less than a minute
TRACED = 3  # micro-batches without a pipeline: the first, one of many, and the last are all there are


class Shard(NamedTuple):
    """This rank's piece of one tensor: of the optimizer's state, or of the weights."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: str
    bytes: int


class DryRun(NamedTuple):
    """What a rank holds, at its peak, and what it sends in a step of `micro_batches`, of which `traced` were run."""

    layout: Layout
    rank: int
    coordinate: dict[str, int]
    layers: tuple[int, ...]
    shards: dict[str, Shard]
    memory: Peak
    calls: Mapping[Transfer, int]
    payload_bytes: Mapping[Transfer, int]
    micro_batches: int
    traced: int


class Step(NamedTuple):
    """What a step held and sent, or how two steps differ."""

    memory: Peak
    calls: Mapping[Transfer, int]
    payload_bytes: Mapping[Transfer, int]

    def plus(self, by: "Step", times: float) -> "Step":
        """This and so many times that."""
        total = round(self.memory.total + times * by.memory.total)
        memory = Peak(total, *(_plus(*pair, times) for pair in zip(self.memory[1:], by.memory[1:], strict=True)))
        return Step(memory, *(_plus(*pair, times) for pair in zip(self[1:], by[1:], strict=True)))

    def minus(self, other: "Step") -> "Step":
        """What this has beyond that."""
        return self.plus(other, -1)


class Traced(NamedTuple):
    """A step, what one more micro-batch in the middle of it would add (without a pipeline), and the rank's shards."""

    step: Step
    middle: Step  # it holds nothing beyond its tokens
    shards: dict[str, Shard]
    layers: tuple[int, ...]


def dry_run(config: RunConfig, world: int, rank: int, *, as_gpu: bool = True) -> DryRun:
    """A step of the rank, after the batch warm-up.

    Raises UserError for a layout that is not legal on `world` ranks, for a rank that is not among them, for DeepSpeed,
    and where a process group is up already: the fake one would take its place.
    """
    config = _eager(after_warmup(config), as_gpu)
    layout = _checked(config, world, rank)
    whole = max(micro_batches(Asked(layout, config.model, config.data, config.kernels)))
    traced = _enough(config, layout, whole)
    found = _traced(config, layout, rank, traced, as_gpu)
    step = found.step
    if traced < whole and layout.pipeline == 1:
        step = step.plus(found.middle, whole - traced)
    elif traced < whole:  # a pipeline has a buffer for each; built anew, for the first step finds nothing gathered
        count = _after(layout, traced, whole)
        more = _traced(config, layout, rank, count, as_gpu).step
        step = step.plus(more.minus(step), (whole - traced) / (count - traced))
    return DryRun(layout, rank, coordinates(layout, rank), found.layers, found.shards, *step, whole, traced)


def stage_ranks(layout: Layout) -> list[int]:
    """The first rank of each place along the pipeline: one of each kind, but for uneven cuts along other axes."""
    return [place * (layout.world // layout.pipeline) for place in range(layout.pipeline)]


def after_warmup(config: RunConfig) -> RunConfig:
    """The run with its last size of batch alone."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_warmup": ()})})


def _traced(config: RunConfig, layout: Layout, rank: int, count: int, as_gpu: bool) -> "Traced":
    """The rank's part, built, and a step of `count` micro-batches."""
    with alone(layout.world, rank), ExitStack() as stack:
        mesh = _mesh(layout, rank)
        parts = cut(config, mesh)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu_ways() if as_gpu else ExitStack())
        for part in parts:
            part.to_empty(device=mesh.device)
        stack.enter_context(without_numbers())
        feeder = AssumedFeeder(config, mesh, as_gpu=as_gpu)
        engine, optimizer = engine_over(parts, feeder, config, mesh)
        shards = {name: _shard(piece) for name, piece in engine.tensors().items()}
        batches = [fakes(config) for _ in range(count)]
        memory, traffic = traced_step(engine, optimizer, batches, config, feeder.note)
        step = Step(memory, dict(traffic.calls), dict(traffic.payload_bytes))
        layers = tuple(int(layer) for part in parts for layer in part.blocks)
        given = sum(tensor.nbytes for tensor in batches[0])
        held = Peak(given, {"workspace": given}, {"workspace": given})
        middle = Step(held, *(feeder.middle() if count >= TRACED and layout.pipeline == 1 else ({}, {})))
        return Traced(step, middle, shards, layers)


def traced_step(
    engine: PipelineEngine | ShardedEngine,
    optimizer: AdamW,
    batches: Sequence[Any],
    config: RunConfig,
    begin: Callable[[Traffic], None] = lambda _: None,
    memory: MemoryTrace | None = None,
) -> tuple[Peak, Traffic]:
    """A step of training, and what it held and sent: of real ranks or of a fake one.

    `begin` is handed the counts before the step. `memory` goes on with the trace of the steps before.
    """
    memory, traffic = memory or MemoryTrace(), Traffic(engine.mesh)
    begin(traffic)
    memory.watch("weights", [piece.local for piece in engine.weights().values()])
    moments = [tensor for tensors in optimizer.state().values() for tensor in tensors.values()]
    memory.watch("optimizer", [*moments, optimizer.count()])
    memory.watch("workspace", [tensor for batch in batches for tensor in batch if isinstance(tensor, Tensor)])
    with memory, traffic:
        sums = engine.forward_backward(batches, len(batches) * config.data.seq_len)
        memory.watch("gradients", engine.gradients().values())
        norm = engine.grad_norm()
        engine.apply(config.optimizer.learning_rate, config.optimizer.max_norm, accepts(sums, norm))
    return memory.peak(), traffic


def _mesh(layout: Layout, rank: int) -> Mesh:
    """As start_mesh has it for these ranks; alone, only mixed precision needs a process group."""
    device = torch.device("cpu")
    if layout.world == 1 and layout.precision != "bf16":
        return Mesh(layout, device, rank, None)
    return lay_mesh(layout, device, rank)


def _checked(config: RunConfig, world: int, rank: int) -> Layout:
    if dist.is_initialized():
        raise UserError("a dry run cannot be made while training", why="its process group would take the other's place")
    if config.layout.engine == "deepspeed":
        raise UserError(
            'engine="deepspeed" has no dry run on ranks that do not exist',
            where="layout.engine",
            why="DeepSpeed allocates and communicates while it starts",
            remedy='set layout.engine="fsdp"; ZeRO stage 3 is much like it with reshard="always"',
        )
    if config.layout.offload != "none":
        raise UserError(
            f"offload={config.layout.offload!r} has no dry run",
            where="layout.offload",
            why="it counts one device's memory, and cannot tell what has been moved to the host's",
            remedy='set layout.offload="none"; of its peak, weights and optimizer are what would move',
        )
    if config.kernels.attention == "varlen" and config.layout.precision != "bf16":
        raise UserError(
            f"varlen attention does not compute in {config.layout.precision}",
            where="kernels.attention",
            remedy='set it to "auto", or layout.precision to "bf16"',
        )
    layout = config.check(world)
    if not 0 <= rank < world:
        raise UserError(
            f"there is no rank {rank:,} among {world:,}", where="--rank", remedy=f"0 to {world - 1:,}, or stages"
        )
    return layout


def _shard(piece: Piece) -> Shard:
    dtype = str(piece.local.dtype).removeprefix("torch.")
    return Shard(tuple(piece.local.shape), piece.offset, piece.global_shape, dtype, piece.local.nbytes)


def _eager(config: RunConfig, as_gpu: bool) -> RunConfig:
    precision = config.layout.precision
    precision = "bf16" if precision == "auto" and as_gpu else precision
    layout = config.layout.model_copy(update={"precision": precision})
    return config.model_copy(update={"layout": layout, "kernels": config.kernels.model_copy(update={"compile": False})})


def _enough(config: RunConfig, layout: Layout, whole: int) -> int:
    """So many micro-batches have all phases of a step; what more of them add is the same for each."""
    if layout.pipeline == 1:
        return min(whole, TRACED)
    if whole * config.model.layers / layout.pipeline <= TRACED_LAYERS:
        return whole
    if layout.schedule == "interleaved":  # taken in rounds: others than of one micro-batch a rank are not alike
        return min(whole, 3 * layout.pipeline) if whole % layout.pipeline == 0 else whole
    # One more than are ever under way on a rank: from here on, each adds what the one before it added.
    full = layout.pipeline * (1 if layout.schedule == "1f1b" else 2) + 1
    return _legal(layout, min(whole, full), whole)


def _after(layout: Layout, traced: int, whole: int) -> int:
    """The next count that adds what all further ones do."""
    return traced + layout.pipeline if layout.schedule == "interleaved" else _legal(layout, traced + 1, whole)


def _legal(layout: Layout, least: int, most: int) -> int:
    return next(n for n in range(least, most + 1) if n == most or not micro_batches_refused(layout, n))


def _plus(one: Mapping[Any, int], by: Mapping[Any, int], times: float) -> dict[Any, int]:
    return {key: round(one.get(key, 0) + times * by.get(key, 0)) for key in {**one, **by}}
