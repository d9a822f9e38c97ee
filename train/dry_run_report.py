"""`minka train RUN --dry-run --world N --rank R`: what a rank would hold and send, for people and as JSON."""

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from minka.parallel.mesh import MESH_AXES
from minka.parallel.traffic import Transfer, sent_bytes
from minka.plan.batch_padding import describe_padding, padding_share
from minka.plan.cli import print_json, table_lines
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.outlook import outlook, outlook_lines
from minka.plan.topology import spans
from minka.train.dry_run import DryRun, Shard, dry_run, stage_ranks

STAGES = "stages"
WEIGHTS, MOMENTS = "model", ("moment1", "moment2")  # first words of the names of a checkpoint's tensors
AXIS_ORDER = (*MESH_AXES, "context", "all")
LAYER = re.compile(r"(?<=\bblocks\.)\d+(?=\.)")


def dry_run_command(config: RunConfig, world: int, rank: str, gpu: str, *, as_json: bool) -> int:
    """Print the dry run of a rank, or those of one rank at each pipeline coordinate (`rank` = "stages").

    With `gpu`, also the run's plan on that GPU.
    """
    planned = outlook(config, world, gpu) if gpu else None
    ranks = _ranks(config, world, rank)
    warning = config.warmup_refused(world)
    found = []
    for number, one in enumerate(ranks):
        start = time.monotonic()
        if not as_json:
            print(f"tracing rank {one:,} ({number + 1} of {len(ranks)}) ...", file=sys.stderr, flush=True)
        dry = dry_run(config, world, one)
        found.append(dry)
        if not as_json:
            head = [] if number else [f"{world:,} ranks: {dry.layout.describe()}", ""]
            print("\n".join([*head, *dry_run_lines(dry, time.monotonic() - start)]), flush=True)
    if as_json:
        share = padding_share(config, found[0].layout)
        whole = {"world": world, "warmup_refused": warning, "padding_share": share}
        print_json({**whole, "plan": planned, "ranks": [as_dict(dry) for dry in found]})
        return 0
    if len(found) > 1:
        largest = max(found, key=lambda dry: dry.memory.total)
        print(f"most memory: rank {largest.rank:,}, {_size(largest.memory.total)}")
    padding = describe_padding(config, found[0].layout)
    if padding:
        print(padding)
    for line in outlook_lines(planned) if planned else []:
        print(line)
    if warning:
        print(f"note: this layout is not legal during the batch warm-up: {warning}")
    return 0


def as_dict(found: DryRun) -> dict[str, Any]:
    """Return everything that was found, as plain values."""
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


def dry_run_lines(found: DryRun, seconds: float) -> list[str]:
    """Return the same as lines and tables for people. `seconds` is how long the dry run took."""
    at = ", ".join(f"{axis} {index}" for axis, index in found.coordinate.items() if getattr(found.layout, axis) > 1)
    traced = "" if found.traced == found.micro_batches else f", of which {found.traced} were traced"
    memory, largest = found.memory.by_kind, found.memory.largest
    peak = [["peak memory", "at the peak", "largest ever"]]
    peak += [[kind, _size(memory[kind]), _size(largest[kind])] for kind in MEMORY_KINDS]
    peak.append(["all", _size(found.memory.total), ""])
    sent = [["sent in a step", "calls", "payload", "sent"]]
    for t, size in _sorted(found):
        name = f"{t.axis} of {t.ranks:,}: {t.kind}, {t.dtype}"
        sent.append([name, f"{found.calls[t]:,}", _size(size), _size(sent_bytes(t, size))])
    return [
        f"rank {found.rank:,}{f' ({at})' if at else ''}: layers {spans(found.layers)}",
        f"micro-batches of a step: {found.micro_batches}{traced}, in {seconds:.0f} s",
        "",
        *table_lines(_shard_rows(found.shards), numbers=(1, 2, 3)),
        "",
        *table_lines(peak, numbers=(1, 2)),
        "",
        *table_lines(sent, numbers=(1, 2, 3)),
        "",
    ]


def _ranks(config: RunConfig, world: int, rank: str) -> Sequence[int]:
    if rank == STAGES:
        return stage_ranks(config.after_warmup().check(world))
    if not (rank.isascii() and rank.isdecimal()):
        raise UserError(
            f"{rank!r} is not a rank", where="--rank", remedy=f"give one of 0 to {world - 1:,}, or {STAGES}"
        )
    return [int(rank)]


def _shard_rows(shards: dict[str, Shard]) -> list[list[str]]:
    """Return a row for each kind of tensor: layers with equal pieces share one, moments are left out for weights."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for name, shard in shards.items():
        kind, _, rest = name.partition(".")
        weight = shards.get(f"{WEIGHTS}.{rest}")
        if kind in MOMENTS and weight and weight[:-1] == shard[:-1]:
            continue
        layer = LAYER.search(name)
        key = (LAYER.sub("*", name), shard.dtype, shard.shape, shard.global_shape, shard.bytes)
        groups.setdefault(key, []).append(int(layer.group()) if layer else -1)
    rows = [["tensor (a weight also has two moments)", "this rank", "whole", "bytes", "dtype"]]
    for (name, dtype, shape, whole, size), layers in groups.items():
        title = name.replace("*", spans(layers), 1)
        rows.append([title, _shape(shape), _shape(whole), _size(size * len(layers)), dtype])
    return rows


def _sorted(found: DryRun) -> list[tuple[Transfer, int]]:
    return sorted(found.payload_bytes.items(), key=lambda item: (AXIS_ORDER.index(item[0].axis), item[0]))


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one"


def _size(count: int) -> str:
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= step:
            return f"{count / step:,.2f} {unit}"
    return f"{count} B"
