"""One rank's part of a run of any size, built and stepped without its memory and without its peers.

The build is training's own, under torch's fake process group and on fake tensors, which have shapes and no numbers. So
are forward, backward and update; what they hold and send is traced as in a real step.

`as_gpu` computes as on a GPU: bf16, variable-length attention, the fused RMS norm, larger chunks of logits. The tensors
are fake CPU tensors all the same: autograd asks for a device's driver even for fake tensors. Blocks run eagerly;
compiled, they hold less workspace and choose what they save.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from minka.kernels.choose import Kernels
from minka.parallel.apply import cut
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.engine import Engine
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.memory_trace import MemoryTrace, Peak
from minka.parallel.mesh import Mesh, lay_mesh
from minka.parallel.pieces import Piece
from minka.parallel.traffic import Traffic, Transfer
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import compute_dtype_name
from minka.plan.layout import Layout, micro_batches, micro_batches_fit
from minka.plan.topology import coordinates
from minka.train.accept_step import accepts
from minka.train.build_engine import engine_over
from minka.train.dry_run_fakes import AssumedInputs, alone, tensors_in, without_numbers
from minka.train.optimizer import AdamW

TRACED_LAYERS = 300  # in a pipeline: layers of a rank times micro-batches that take less than a minute
TRACED = 3  # micro-batches without a pipeline: the first, one of many, and the last are all kinds there are


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
    """What a step holds and sends, or the difference of two steps."""

    memory: Peak
    calls: Mapping[Transfer, int]
    payload_bytes: Mapping[Transfer, int]

    def plus(self, other: "Step", times: float) -> "Step":
        """Return this step and `times` times the other."""
        total = round(self.memory.total + times * other.memory.total)
        memory = Peak(total, *(_plus(*pair, times) for pair in zip(self.memory[1:], other.memory[1:], strict=True)))
        return Step(memory, *(_plus(*pair, times) for pair in zip(self[1:], other[1:], strict=True)))

    def minus(self, other: "Step") -> "Step":
        """Return what this step has beyond the other."""
        return self.plus(other, -1)


class Traced(NamedTuple):
    """A step, what one more micro-batch in its middle would add (without a pipeline), and the rank's shards."""

    step: Step
    middle: Step  # holds nothing beyond its tokens
    shards: dict[str, Shard]
    layers: tuple[int, ...]


def dry_run(config: RunConfig, world: int, rank: int, *, as_gpu: bool = True) -> DryRun:
    """Return a step of the rank, after the batch warm-up.

    Raises UserError for a layout that is not legal on `world` ranks, a rank that is not among them, DeepSpeed, offload,
    and where a process group exists: the fake one would replace it.
    """
    config = _as_traced(config.after_warmup(), "cuda" if as_gpu else "cpu")
    layout = _check(config, world, rank)
    whole = max(micro_batches(layout, config.data))
    traced = _enough(config, layout, whole)
    found = _traced(config, layout, rank, traced, as_gpu)
    step = found.step
    if traced < whole and layout.pipeline == 1:
        step = step.plus(found.middle, whole - traced)
    elif traced < whole:  # a pipeline has a buffer for each; built again, because a first step finds nothing gathered
        rounds = layout.schedule == "interleaved"  # the next count adds what all further ones add
        count = traced + layout.pipeline if rounds else _legal(layout, traced + 1, whole)
        more = _traced(config, layout, rank, count, as_gpu).step
        step = step.plus(more.minus(step), (whole - traced) / (count - traced))
    return DryRun(layout, rank, coordinates(layout, rank), found.layers, found.shards, *step, whole, traced)


def stage_ranks(layout: Layout) -> list[int]:
    """Return the first rank of each pipeline coordinate; its other ranks differ only where other cuts are uneven."""
    return list(range(0, layout.world, layout.world // layout.pipeline))


def _traced(config: RunConfig, layout: Layout, rank: int, count: int, as_gpu: bool) -> Traced:
    """Build the rank's part and trace a step of `count` micro-batches."""
    with alone(layout.world, rank), ExitStack() as stack:
        mesh = _mesh(layout, rank, casts=config.optimizer.weights == "bf16")
        kernels = _as_traced_kernels(kernels_of(config, mesh, as_gpu=as_gpu))
        parts = cut(config, mesh, kernels)
        for part in parts:
            part.head.device_kind = "cuda" if as_gpu else ""
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for part in parts:
            part.to_empty(device=mesh.device)
        stack.enter_context(without_numbers())
        cutter = InputCutter.over(mesh, kernels, as_gpu=as_gpu)
        engine, optimizer = engine_over(parts, cutter, config)
        inputs = AssumedInputs(config, cutter)
        shards = {name: _shard(piece) for name, piece in engine.tensors().items()}
        batches = [inputs.make(mode) for _ in range(count)]
        memory, traffic = traced_step(engine, optimizer, batches, config, inputs.watch)
        step = Step(memory, dict(traffic.calls), dict(traffic.payload_bytes))
        layers = tuple(int(layer) for part in parts for layer in part.blocks)
        given = sum(tensor.nbytes for tensor in tensors_in(batches[0]))
        held = Peak(given, {"workspace": given}, {"workspace": given})
        middle = Step(held, *(inputs.middle() if count >= TRACED and layout.pipeline == 1 else ({}, {})))
        return Traced(step, middle, shards, layers)


def traced_step(
    engine: Engine,
    optimizer: AdamW,
    batches: Sequence[ModelInputs],
    config: RunConfig,
    start: Callable[[Traffic], None] = lambda _: None,
    memory: MemoryTrace | None = None,
) -> tuple[Peak, Traffic]:
    """Run a step of training on real ranks or a fake one, and return what it held and sent.

    `start` gets the counts before the step. `memory` continues the trace of earlier steps.
    """
    memory, traffic = memory or MemoryTrace(), Traffic(engine.mesh)
    start(traffic)
    memory.watch("weights", [piece.local for piece in engine.weight_pieces().values()])
    moments = [tensor for tensors in optimizer.state().values() for tensor in tensors.values()]
    memory.watch("optimizer", [*moments, optimizer.count()])
    memory.watch("workspace", [tensor for inputs in batches for tensor in tensors_in(inputs)])
    with memory, traffic:
        sums = engine.forward_backward(batches, len(batches) * config.data.seq_len)
        memory.watch("gradients", engine.gradients().values())
        norm = engine.grad_norm()
        engine.apply(config.optimizer.learning_rate, config.optimizer.max_norm, accepts(sums, norm))
    return memory.peak(), traffic


def _as_traced_kernels(kernels: Kernels) -> Kernels:
    """What holds the same memory on a GPU, and can be traced: on a CPU torch takes these two operations apart.

    Its fused norm would then save three tensors in fp32 in place of its input; FlexAttention would hold all logits.
    """
    rms_norm = "triton" if kernels.rms_norm == "aten" else kernels.rms_norm
    attention = "varlen" if kernels.attention == "flex" else kernels.attention
    return replace(kernels, rms_norm=rms_norm, attention=attention)


def _mesh(layout: Layout, rank: int, *, casts: bool) -> Mesh:
    """Return what start_mesh returns on these ranks; a single rank has a process group only where bf16 is cast."""
    device = torch.device("cpu")
    if layout.world == 1 and layout.precision != "bf16" and not casts:
        return Mesh(layout, device, rank, None)
    return lay_mesh(layout, device, rank)


def _check(config: RunConfig, world: int, rank: int) -> Layout:
    if dist.is_initialized():
        raise UserError("a dry run cannot be made while training", why="its process group would replace the other one")
    if config.layout.engine == "deepspeed":
        raise UserError(
            'engine="deepspeed" has no dry run with --world',
            where="layout.engine",
            why="DeepSpeed allocates and communicates while it starts",
            remedy='set layout.engine="fsdp"; ZeRO stage 3 is similar to reshard="always"',
        )
    if config.layout.offload != "none":
        raise UserError(
            f"offload={config.layout.offload!r} has no dry run with --world",
            where="layout.offload",
            why="it counts the memory of one device, and cannot tell what was moved to the host",
            remedy='set layout.offload="none"; weights and optimizer of its peak are what would move',
        )
    layout = config.check(world)
    if not 0 <= rank < world:
        raise UserError(
            f"rank {rank:,} is not among {world:,}", where="--rank", remedy=f"give 0 to {world - 1:,}, or stages"
        )
    return layout


def _shard(piece: Piece) -> Shard:
    dtype = str(piece.local.dtype).removeprefix("torch.")
    return Shard(tuple(piece.local.shape), piece.offset, piece.global_shape, dtype, piece.local.nbytes)


def _as_traced(config: RunConfig, device_kind: str) -> RunConfig:
    """Return the run with eager blocks and its compute dtype."""
    precision = compute_dtype_name(config.layout, device_kind)
    layout = config.layout.model_copy(update={"precision": precision})
    return config.model_copy(update={"layout": layout, "kernels": config.kernels.model_copy(update={"compile": False})})


def _enough(config: RunConfig, layout: Layout, whole: int) -> int:
    """Return how many micro-batches have all phases of a step; each further one adds the same."""
    if layout.pipeline == 1:
        return min(whole, TRACED)
    if whole * config.model.layers / layout.pipeline <= TRACED_LAYERS:
        return whole
    if layout.schedule == "interleaved":  # runs in rounds, which are alike only with one micro-batch a rank
        return min(whole, 3 * layout.pipeline) if whole % layout.pipeline == 0 else whole
    # One more than are ever under way on a rank: from here on, each adds what the one before it added.
    full = layout.pipeline * (1 if layout.schedule == "1f1b" else 2) + 1
    return _legal(layout, min(whole, full), whole)


def _legal(layout: Layout, least: int, most: int) -> int:
    return next(n for n in range(least, most + 1) if n == most or micro_batches_fit(layout, n))


def _plus(one: Mapping[Any, int], other: Mapping[Any, int], times: float) -> dict[Any, int]:
    return {key: round(one.get(key, 0) + times * other.get(key, 0)) for key in {**one, **other}}
