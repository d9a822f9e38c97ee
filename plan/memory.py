"""Memory of a rank at its peak, from numbers alone: what a dry run traces, in a millisecond and without torch.

Without a pipeline these moments of the last micro-batch can be the largest: its loss, where a chunk of logits exists
next to every activation; the backward pass of the last block, where its intermediates do; that of a unit's first block,
whose gradients wait for it; and the reduction of a unit of blocks or of what is in none, whose gradients are whole, in
the buffers they are reduced in, and reduced. With a pipeline the moments of each pass can be (memory_pipeline.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import Layout, micro_batches
from minka.plan.memory_block import BlockMemory
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.memory_pipeline import peak_of_coordinate
from minka.plan.memory_stage import Stage
from minka.plan.pipeline_stages import stages_of


class RankMemory(NamedTuple):
    """Bytes of a rank at its peak, and which moment that is; every rank of a pipeline coordinate has them."""

    rank: int  # the first one of the coordinate
    stages: tuple[int, ...]  # those that it holds
    moment: str
    by_kind: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def predict_memory(config: RunConfig, world: int, device_kind: str = "cuda") -> tuple[RankMemory, ...]:
    """The peak of each pipeline coordinate in order, with nothing compiled; without a pipeline one.

    It is that of the coordinate's first rank, which has the most; on cores ("cpu") without the few MiB in which bf16
    weights or moments are updated. Raises UserError for a layout that is not legal on
    `world` ranks, for DeepSpeed and for offload.
    """
    config, layout = _checked(config, world)
    block, count = BlockMemory(config, layout, device_kind), max(micro_batches(layout, config.data))
    if layout.pipeline == 1:
        moment, by_kind = max(_moments(Stage(block, config.model.layers), count), key=lambda one: sum(one[1].values()))
        return (RankMemory(0, (0,), moment, by_kind),)
    return tuple(_of_pipeline(config, layout, block, count, range(layout.pipeline)))


def peak_or_more(config: RunConfig, world: int, room: float, device_kind: str = "cuda") -> int:
    """Return the largest peak of any rank, or the first one found that is above `room`: a search needs no more."""
    config, layout = _checked(config, world)
    if layout.pipeline == 1:
        return predict_memory(config, world, device_kind)[0].total
    block, count = BlockMemory(config, layout, device_kind), max(micro_batches(layout, config.data))
    likely = (0, layout.pipeline - 1, *range(1, layout.pipeline - 1))  # the ends also hold embedding and head
    largest = 0
    for one in _of_pipeline(config, layout, block, count, likely):
        largest = max(largest, one.total)
        if largest > room:
            break
    return largest


def _checked(config: RunConfig, world: int) -> tuple[RunConfig, Layout]:
    config = config.after_warmup()
    layout = config.check(world)
    for key, value in (("engine", "deepspeed"), ("offload", "optimizer"), ("offload", "all")):
        if getattr(layout, key) == value:
            what, remedy = f"memory under {key}={value!r} is not predicted", "run it, or set the default"
            raise UserError(what, where=f"layout.{key}", why="what it holds where is its own", remedy=remedy)
    return config, layout


def _of_pipeline(
    config: RunConfig, layout: Layout, block: BlockMemory, count: int, coordinates: Iterable[int]
) -> Iterator[RankMemory]:
    layers = [len(stage) for stage in stages_of(layout, config.model)]
    last = layout.stage_count - 1
    for coordinate in coordinates:
        held = tuple(layout.stages_of_rank(coordinate))
        stages = {one: Stage(block, layers[one], first=one == 0, last=one == last) for one in held}
        moment, by_kind = peak_of_coordinate(layout, coordinate, stages, count)
        yield RankMemory(coordinate * layout.world // layout.pipeline, held, moment, by_kind)


def _moments(s: Stage, micro_batch_count: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The moments of the last micro-batch of a whole model, and the bytes of each kind."""
    b = s.block
    c, fixed, saved = b.c, _fixed(s), b.saved()
    later, step = micro_batch_count > 1, b.layout.reduce == "step"
    unit, blocks = s.unit or s.layers, s.layers * b.size
    accumulated = 0
    if later and step and b.fsdp:
        accumulated = (s.ends + blocks) * b.g
    elif later:  # and the buffer that the root was reduced in, until the next reduction
        accumulated = s.shards * b.w + (s.ends * b.g if b.fsdp else 0)
    shared = b.angles() + b.tokens * 16 + b.mask()
    gathered = s.gathered + s.layers * b.kept_rows()
    # What the unit that was gathered last arrived in stays until the next one is.
    buffer = 0 if later and (s.kept or not s.units) else s.buffer
    hidden = b.tokens * b.d * c
    loss = {
        "gradients": accumulated + s.matrix * b.g + hidden,
        "activations": s.layers * saved + b.hidden + b.own * 4 + shared,
        "gathered": gathered + buffer + (hidden if b.layout.tensor > 1 else 0),
        "logits": b.logits(),
        "workspace": 2 * b.hidden,
    }
    yield "loss", {**fixed, **loss}
    # The head's gradient is multiplied by that of the objective, and rounded.
    rounded = s.matrix * c if c < b.g else 0
    head = {**loss, "gradients": loss["gradients"] + rounded, "logits": 0}
    head["gathered"] -= buffer if s.kept and s.units else 0
    yield "head", {**fixed, **head, "workspace": s.matrix * b.g + b.hidden}
    # The unit that is gathered, and the next one or what it arrives in.
    again = (2 if b.data > 1 else min(2, len(s.units))) * unit * b.size * c
    own_head = 0 if later and step and b.fsdp else s.matrix * c
    back = {
        "gradients": accumulated + b.hidden + own_head + b.d * b.f * c,
        "activations": s.layers * saved + b.recomputed() + shared - b.tokens * b.f * c,
        "gathered": gathered + (0 if s.kept else again if s.units else buffer) + b.gathered_rows() - b.kept_rows(),
        "workspace": 4 * b.tokens * b.f * c + hidden,
    }
    after_mlp = {
        "gradients": back["gradients"] + 2 * b.d * b.f * c,
        "activations": back["activations"] - 2 * b.tokens * b.f * c,
        "workspace": b.tokens * b.f * c + 2 * hidden,
    }
    for moment in (back, {**back, **after_mlp}):
        yield "backward", {**fixed, **moment}
        done = unit - 1  # blocks of a unit whose gradients wait for the last one's
        waiting = {
            "gradients": moment["gradients"] + done * b.size * c * (not later or (b.fsdp and c < b.g)),
            "activations": moment["activations"] - done * saved,
            "gathered": moment["gathered"] - done * b.kept_rows(),
        }
        yield "backward of a unit's first block", {**fixed, **moment, **waiting}
    if b.fsdp and s.layers > unit and not s.kept:  # the unit before is being reduced
        reducing = (0 if accumulated and step else unit * b.size * b.g) + unit * b.shards * b.w
        fewer = {**back, "activations": back["activations"] - unit * saved}
        yield "backward, reducing", {**fixed, **fewer, "gradients": back["gradients"] + reducing}
    yield from _reductions(s, fixed, shared, own_head, later=later and step)


def _reductions(
    s: Stage, fixed: Mapping[str, int], shared: int, own_head: int, *, later: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    """The end of backward: the last unit of blocks is reduced, then embedding and head, and blocks in no unit."""
    b, unit = s.block, s.unit
    if s.units:
        ends = s.ends * b.g if later else own_head
        gathered = s.gathered if s.kept else (s.root + unit * b.size) * b.c * b.fsdp
        reducing = _reduction(s, unit * b.size, unit * b.shards, (s.layers - unit) * b.shards, later) + ends
        yield "reduction of blocks", {**fixed, "gradients": reducing, "activations": shared, "gathered": gathered}
    if b.fsdp:
        last = _reduction(s, s.root, s.root_shards, s.shards - s.root_shards, later)
        last += s.matrix * b.c * (later and b.c < b.g)  # of the embedding, as backward left it
    else:
        last = s.shards * b.w + s.matrix * b.c
    yield "reduction", {**fixed, "gradients": last}


def _reduction(s: Stage, size: int, shards: int, before: int, later: bool) -> int:
    """Gradients while those of `size` elements are reduced into `shards`, after others into `before`.

    later: they were added up whole.
    """
    b = s.block
    rounded = b.w < b.g  # replicas' sums then stay in fp32 until the end
    reduced = before * (b.w + b.g * (rounded and b.layout.replicate > 1))
    sums, copy = size * (b.g if later else b.c), size * b.g
    ends_with_head = size == s.root and bool(s.units or not b.model.tied)
    last = s.matrix if ends_with_head else b.d * b.f  # of what was copied, it is let go of last
    again = copy if b.data == 1 else 0
    return reduced + copy + max(sums, (shards + last) * b.g + max(again, shards * b.w * rounded))


def _fixed(s: Stage) -> dict[str, int]:
    b = s.block
    return dict.fromkeys(MEMORY_KINDS, 0) | {"weights": s.shards * b.w, "optimizer": 2 * s.shards * b.m + 4}
