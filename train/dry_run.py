"""One rank's part of a run of any size, built and stepped without its memory and without its peers.

It is training's own code, under torch's fake process group and on fake tensors, which have shapes and no numbers.
`as_gpu` computes as on a GPU: bf16, variable-length attention, the fused RMS norm, larger chunks of logits. The tensors
are fake CPU tensors all the same: autograd asks for a device's driver even for fake tensors. Blocks run eagerly;
compiled, they hold less workspace and choose what they save.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from minka.parallel.apply import cut
from minka.parallel.engine import Engine
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.memory_trace import MemoryTrace, Peak
from minka.parallel.mesh import Mesh, lay_mesh
from minka.parallel.pieces import Piece
from minka.parallel.traffic import Traffic, Transfer
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import attention_kind, compute_dtype_name
from minka.plan.layout import Layout, micro_batches, micro_batches_fit
from minka.plan.topology import coordinates
from minka.train.accept_step import accepts
from minka.train.build_engine import engine_over
from minka.train.dry_run_fakes import alone, assumed_inputs, tensors_in, without_numbers
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


def dry_run(config: RunConfig, world: int, rank: int, *, as_gpu: bool = True) -> DryRun:
    """Return a step of the rank, after the batch warm-up. Raises UserError for what cannot be traced (`_check`)."""
    config = _as_traced(after_warmup(config), "cuda" if as_gpu else "cpu")
    layout = _check(config, world, rank)
    whole = max(micro_batches(layout, config.data))
    traced = _enough(config, layout, whole)
    step, middle, shards, layers = _traced(config, layout, rank, traced, as_gpu)
    if traced < whole and layout.pipeline == 1:
        step = _plus(step, middle, whole - traced)
    elif traced < whole:  # a pipeline has a buffer for each; built again, because a first step finds nothing gathered
        # The next count that adds what all further ones add.
        interleaved = layout.schedule == "interleaved"
        count = traced + layout.pipeline if interleaved else _legal(layout, traced + 1, whole)
        more, *_ = _traced(config, layout, rank, count, as_gpu)
        step = _plus(step, _plus(more, step, -1), (whole - traced) / (count - traced))
    return DryRun(layout, rank, coordinates(layout, rank), layers, shards, *step, whole, traced)


def after_warmup(config: RunConfig) -> RunConfig:
    """Return the run without its batch warm-up."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_warmup": ()})})


def _traced(
    config: RunConfig, layout: Layout, rank: int, count: int, as_gpu: bool
) -> tuple[Step, Step, dict[str, Shard], tuple[int, ...]]:
    """Build the rank's part and trace a step of `count` micro-batches. Return it, with the rank's shards and layers.

    The second step is what one more micro-batch in the middle would add, without a pipeline: it holds only its tokens.
    """
    device, kind = torch.device("cpu"), "cuda" if as_gpu else "cpu"
    with alone(layout.world, rank), ExitStack() as stack:
        # As start_mesh does: a single rank has a process group only for bf16.
        grouped = layout.world > 1 or layout.precision == "bf16"
        mesh = lay_mesh(layout, device, rank) if grouped else Mesh(layout, device, rank, None)
        parts = cut(config, mesh)
        for part in parts:
            part.head.device_kind = "cuda" if as_gpu else ""
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(without_numbers(as_gpu=as_gpu))
        for part in parts:
            part.to_empty(device=device)
        attention = attention_kind(config.kernels.attention, kind, layout.precision)
        cutter = InputCutter(mesh, varlen=attention == "varlen")
        engine, optimizer = engine_over(parts, cutter, config)
        shards = {name: _shard(piece) for name, piece in engine.tensors().items()}
        memory, traffic = MemoryTrace(), Traffic(mesh)
        sent: list[tuple[Counter[Transfer], Counter[Transfer]]] = []  # before each micro-batch

        def note() -> None:
            sent.append((Counter(traffic.calls), Counter(traffic.payload_bytes)))

        batches = [assumed_inputs(config, cutter, mode, note) for _ in range(count)]
        traced_step(engine, optimizer, batches, config, memory, traffic)
        step = Step(memory.peak(), dict(traffic.calls), dict(traffic.payload_bytes))
        given = sum(tensor.nbytes for tensor in tensors_in(batches[0]))
        middle = Step(Peak(given, {"workspace": given}, {"workspace": given}), {}, {})
        if count >= TRACED and layout.pipeline == 1:
            (calls, payload), (calls_after, payload_after) = sent[1:3]
            middle = Step(middle.memory, calls_after - calls, payload_after - payload)
        return step, middle, shards, tuple(int(layer) for part in parts for layer in part.blocks)


def traced_step(
    engine: Engine,
    optimizer: AdamW,
    batches: Sequence[ModelInputs],
    config: RunConfig,
    memory: MemoryTrace,
    traffic: Traffic,
) -> None:
    """Run a step of training, on real ranks or a fake one, and trace what it holds and sends."""
    memory.watch("weights", [piece.local for piece in engine.weight_pieces().values()])
    moments = [tensor for tensors in optimizer.state().values() for tensor in tensors.values()]
    memory.watch("optimizer", [*moments, optimizer.count()])
    memory.watch("workspace", [tensor for inputs in batches for tensor in tensors_in(inputs)])
    with memory, traffic:
        sums = engine.forward_backward(batches, len(batches) * config.data.seq_len)
        memory.watch("gradients", engine.gradients().values())
        norm = engine.grad_norm()
        engine.apply(config.optimizer.learning_rate, config.optimizer.max_norm, accepts(sums, norm))


def _check(config: RunConfig, world: int, rank: int) -> Layout:
    if dist.is_initialized():
        raise UserError("a dry run cannot be made while training", why="its process group would replace the other one")
    if config.layout.engine == "deepspeed":
        what = "DeepSpeed has no dry run with --world: it allocates and communicates while it starts"
        remedy = 'set layout.engine="fsdp"; ZeRO stage 3 is similar to reshard="always"'
        raise UserError(what, where="layout.engine", remedy=remedy)
    if config.layout.offload != "none":
        what = "offload has no dry run with --world: the memory of one device is counted, not what moves to the host"
        remedy = 'set layout.offload="none"; weights and optimizer of its peak are what would move'
        raise UserError(what, where="layout.offload", remedy=remedy)
    layout = config.check(world)
    if not 0 <= rank < world:
        what, remedy = f"rank {rank:,} is not among {world:,}", f"give 0 to {world - 1:,}, or stages"
        raise UserError(what, where="--rank", remedy=remedy)
    return layout


def _shard(piece: Piece) -> Shard:
    dtype = str(piece.local.dtype).removeprefix("torch.")
    return Shard(tuple(piece.local.shape), piece.offset, piece.global_shape, dtype, piece.local.nbytes)


def _as_traced(config: RunConfig, device_kind: str) -> RunConfig:
    """Return the run with eager blocks and its compute dtype. Raises UserError where attention cannot run."""
    precision = compute_dtype_name(config.layout, device_kind)
    attention_kind(config.kernels.attention, device_kind, precision)
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


def _plus(one: Any, other: Any, times: float) -> Any:
    """Return `one` and `times` times the other: steps, and the tables and numbers in them."""
    if isinstance(one, tuple):
        return type(one)(*(_plus(*pair, times) for pair in zip(one, other, strict=True)))
    if isinstance(one, dict):
        return {key: _plus(one.get(key, 0), other.get(key, 0), times) for key in {**one, **other}}
    return round(one + times * other)
