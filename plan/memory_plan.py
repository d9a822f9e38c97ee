"""`minka plan memory`: what a rank holds at its peak, and whether that fits into a GPU."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from minka.plan.errors import UserError
from minka.plan.flops import parameters
from minka.plan.hardware import GPUS, Gpu, find_gpu
from minka.plan.load_config import load_run
from minka.plan.memory import RankMemory, predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS

MARGIN = 0.08  # of the GPU: CUDA's context, NCCL's buffers, holes between allocations
COLUMNS = 8  # coordinates in a table


def memory_plan(run: str, overrides: Sequence[str], world: int, gpu_name: str = "") -> dict[str, Any]:
    """The memory of a rank at each pipeline coordinate of `world` ranks, under the keys of the JSON. Raises UserError.

    The step is one after the batch warm-up.
    """
    gpu = _gpu(gpu_name) if gpu_name else None
    config = load_run(run, overrides).config
    ranks = [_as_dict(one, gpu) for one in predict_memory(config, world)]
    layout = config.after_warmup().check(world)
    return {
        "world": world,
        "parameters": parameters(config.model),
        "layout": layout.model_dump(mode="json"),
        "warmup_refused": config.warmup_refused(world),
        "gpu": gpu.name if gpu else None,
        "gpu_bytes": gpu.memory_gb * 10**9 if gpu else None,
        "ranks": ranks,
    }


def _as_dict(found: RankMemory, gpu: Gpu | None) -> dict[str, Any]:
    rank: dict[str, Any] = {
        "rank": found.rank,
        "stages": list(found.stages),
        "moment": found.moment,
        "peak_bytes": found.total,
        "peak_bytes_by_kind": found.by_kind,
    }
    if gpu:
        size = gpu.memory_gb * 10**9
        rank |= {"margin_bytes": size - found.total, "fits": size - found.total >= MARGIN * size}
    return rank


def _gpu(name: str) -> Gpu:
    gpu = find_gpu(name)
    if gpu is None:
        known = [one.name for one in GPUS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise UserError(f"no GPU {name!r} is known", where="--gpu", remedy=f"known: {', '.join(near)}")
    return gpu


def memory_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people: kinds, and of a pipeline a column for each coordinate, the largest first."""
    ranks = sorted(found["ranks"], key=lambda rank: -rank["peak_bytes"])
    shown = ranks[:COLUMNS]
    rows = [[f"GiB, of {found['world']:,} ranks", *(f"rank {rank['rank']:,}" for rank in shown)]]
    if len(ranks) > 1:
        rows.append(["stages", *(",".join(map(str, rank["stages"])) for rank in shown)])
    rows += [[f"  {kind}", *(_gib(rank["peak_bytes_by_kind"][kind]) for rank in shown)] for kind in MEMORY_KINDS]
    rows.append(["peak", *(_gib(rank["peak_bytes"]) for rank in shown)])
    if found["gpu"]:
        rows.append(
            [f"left of {found['gpu']}", *(f"{rank['margin_bytes'] / found['gpu_bytes']:.0%}" for rank in shown)]
        )
    return rows


def memory_notes(found: Mapping[str, Any]) -> list[str]:
    """What to say below the table."""
    ranks = sorted(found["ranks"], key=lambda rank: -rank["peak_bytes"])
    largest, rest = ranks[0], ranks[COLUMNS:]
    notes = [f"largest at: {largest['moment']}; blocks not compiled"]
    if rest:
        notes.append(f"and {len(rest)} more, from {_gib(rest[-1]['peak_bytes'])} to {_gib(rest[0]['peak_bytes'])} GiB")
    if found["gpu"]:
        share = largest["margin_bytes"] / found["gpu_bytes"]
        verdict = "fits" if largest["fits"] else "does not fit" if share < 0 else "fits without room for CUDA and NCCL"
        notes.append(f"{found['gpu']} ({_gib(found['gpu_bytes'])} GiB): {verdict}")
    if found["warmup_refused"]:
        notes.append(f"note: this layout is not legal during the batch warm-up: {found['warmup_refused']}")
    return notes


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
