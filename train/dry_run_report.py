"""`minka train RUN --dry-run --world N --rank R`: what a rank would hold and send, for people and as JSON."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from minka.parallel.mesh import MESH_AXES
from minka.parallel.traffic import sent_bytes
from minka.plan.cli import print_json
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import AXES
from minka.plan.memory import KINDS
from minka.plan.padding import describe_padding, padding_share
from minka.train.dry_run import DryRun, Shard, after_warmup, dry_run, stage_ranks

STAGES = "stages"
WEIGHTS, MOMENTS = "model", ("moment1", "moment2")  # beginnings of the names of a checkpoint's tensors
AXIS_ORDER = (*MESH_AXES, "context", "all")
LAYER = re.compile(r"(?<=\bblocks\.)\d+(?=\.)")


def dry_run_command(config: RunConfig, world: int, rank: str, *, as_json: bool) -> int:
    """Print the dry runs of a rank, or of one rank for each place along the pipeline (`rank` = "stages")."""
    ranks = _ranks(config, world, rank)
    warning = warmup_refused(config, world)
    found = []
    for number, one in enumerate(ranks):
        begun = time.monotonic()
        if not as_json:
            print(f"tracing rank {one:,} ({number + 1} of {len(ranks)}) ...", file=sys.stderr, flush=True)
        dry = dry_run(config, world, one)
        found.append(dry)
        if not as_json:
            print("\n".join(told(dry, first=number == 0, seconds=time.monotonic() - begun)), flush=True)
    if as_json:
        share = padding_share(config, found[0].layout)
        whole = {"world": world, "warmup_refused": warning, "padding_share": share}
        print_json({**whole, "ranks": [as_dict(dry) for dry in found]})
        return 0
    if len(found) > 1:
        dearest = max(found, key=lambda dry: dry.memory.total)
        print(f"most memory: rank {dearest.rank:,}, {_size(dearest.memory.total)}")
    fillers = describe_padding(config, found[0].layout)
    if fillers:
        print(fillers)
    if warning:
        print(f"note: while the batch is warming up, this layout is not legal: {warning}")
    return 0


def warmup_refused(config: RunConfig, world: int) -> str:
    """Why a layout that is legal for the last size of batch is not for an earlier one; empty where it is."""
    try:
        config.check(world)
    except UserError as refused:
        return str(refused)
    return ""


def as_dict(found: DryRun) -> dict[str, Any]:
    """Everything that was found, in plain values."""
    transfers = [
        {**t._asdict(), "calls": found.calls[t], "payload_bytes": size, "sent_bytes": sent_bytes(t, size)}
        for t, size in _sorted(found)
    ]
    return {
        "rank": found.rank,
        "coordinate": found.coordinate,
        "layout": found.layout.model_dump(mode="json"),
        "layers": list(found.layers),
        "micro_batches": found.micro_batches,
        "micro_batches_traced": found.traced,
        "peak_bytes": found.memory.total,
        "peak_bytes_by_kind": found.memory.by_kind,
        "largest_bytes_by_kind": found.memory.largest,
        "shards": {name: shard._asdict() for name, shard in found.shards.items()},
        "transfers": transfers,
    }


def told(found: DryRun, *, first: bool, seconds: float) -> list[str]:
    """The same as lines; `first` has what all ranks share."""
    lines = []
    if first:
        cut = ", ".join(f"{axis} {getattr(found.layout, axis)}" for axis in AXES if getattr(found.layout, axis) > 1)
        lines = [f"{found.layout.world:,} ranks: {cut or 'one rank'}", ""]
    place = ", ".join(f"{axis} {at}" for axis, at in found.coordinate.items() if getattr(found.layout, axis, 1) > 1)
    traced = "" if found.traced == found.micro_batches else f", of which {found.traced} were traced"
    lines += [
        f"rank {found.rank:,}{f' ({place})' if place else ''}: layers {_spans(found.layers)}",
        f"  micro-batches of a step: {found.micro_batches}{traced}, in {seconds:.0f} s",
        "",
        *_shard_lines(found.shards),
        "",
        f"  {'peak memory':<40}{'at the peak':>14}{'most ever':>14}",
        *(f"  {k:<40}{_size(found.memory.by_kind[k]):>14}{_size(found.memory.largest[k]):>14}" for k in KINDS),
        f"  {'all':<40}{_size(found.memory.total):>14}",
        "",
        f"  {'sent in a step':<40}{'calls':>14}{'payload':>14}{'sent':>14}",
    ]
    for t, size in _sorted(found):
        name = f"{t.axis} of {t.ranks:,}: {t.kind}, {t.dtype}"
        lines.append(f"  {name:<40}{found.calls[t]:>14,}{_size(size):>14}{_size(sent_bytes(t, size)):>14}")
    return [*lines, ""]


def _ranks(config: RunConfig, world: int, rank: str) -> Sequence[int]:
    if rank == STAGES:
        return stage_ranks(after_warmup(config).check(world))
    if not (rank.isascii() and rank.isdecimal()):
        raise UserError(f"{rank!r} is no rank", where="--rank", remedy=f"give one of 0 to {world - 1:,}, or {STAGES}")
    return [int(rank)]


def _shard_lines(shards: dict[str, Shard]) -> Iterator[str]:
    """A line for each sort of tensor: layers that have the same piece are told as one, moments with their weights."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for name, shard in shards.items():
        kind, _, rest = name.partition(".")
        weight = shards.get(f"{WEIGHTS}.{rest}")
        if kind in MOMENTS and weight and weight[:-1] == shard[:-1]:
            continue
        layer = LAYER.search(name)
        key = (LAYER.sub("*", name), shard.dtype, shard.shape, shard.global_shape, shard.bytes)
        groups.setdefault(key, []).append(int(layer.group()) if layer else -1)
    yield f"  {'tensor (a weight has two moments, too)':<40}{'this rank':>20}{'whole':>20}{'bytes':>14}"
    for (name, dtype, shape, whole, size), layers in groups.items():
        title = name.replace("*", _spans(layers), 1)
        yield f"  {title:<40}{_shape(shape):>20}{_shape(whole):>20}{_size(size * len(layers)):>14}  {dtype}"


def _sorted(found: DryRun) -> list[tuple[Any, int]]:
    return sorted(found.payload_bytes.items(), key=lambda item: (AXIS_ORDER.index(item[0].axis), item[0]))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one"


def _spans(numbers: Sequence[int]) -> str:
    """0-6, 9: ranges of numbers."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) or "none"


def _size(count: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= step:
            return f"{count / step:,.2f} {unit}"
    return f"{count} B"
