"""`minka plan memory`: what ranks hold at their peak, and whether that fits into a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from minka.plan.cluster import Cluster, find_cluster
from minka.plan.flops import parameters
from minka.plan.layout_search import MARGIN
from minka.plan.load_config import load_run
from minka.plan.memory import RankMemory, predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.plan.run_job import on_cluster

COLUMNS = 8  # coordinates in a table


def memory_plan(run: str, overrides: Sequence[str], world: int, gpu_name: str = "") -> dict[str, Any]:
    """The memory of a rank at each pipeline coordinate of `world` ranks, under the keys of the JSON. Raises UserError.

    The step is one after the batch warm-up.
    """
    cluster = find_cluster(gpu_name) if gpu_name else None
    config = load_run(run, overrides).config
    config = on_cluster(config, cluster) if cluster else config
    kind = cluster.device_kind if cluster else "cuda"
    ranks = [_as_dict(one, cluster) for one in predict_memory(config, world, kind)]
    layout = config.after_warmup().check(world)
    return {
        "world": world,
        "parameters": parameters(config.model),
        "layout": layout.model_dump(mode="json"),
        "warmup_refused": config.warmup_refused(world),
        "gpu": cluster.name if cluster else None,
        "gpu_bytes": cluster.memory_bytes if cluster else None,
        "ranks": ranks,
    }


def _as_dict(found: RankMemory, cluster: Cluster | None) -> dict[str, Any]:
    rank: dict[str, Any] = {
        "rank": found.rank,
        "stages": list(found.stages),
        "moment": found.moment,
        "peak_bytes": found.total,
        "peak_bytes_by_kind": found.by_kind,
    }
    if cluster:
        size = cluster.memory_bytes
        rank |= {"margin_bytes": size - found.total, "fits": size - found.total >= MARGIN * size}
    return rank


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
        size = found["gpu_bytes"]
        rows.append([f"left of {found['gpu']}", *(f"{rank['margin_bytes'] / size:.0%}" for rank in shown)])
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
