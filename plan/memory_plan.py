"""`minka plan memory`: what a rank holds at its peak, and whether that fits into a GPU."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from minka.plan.errors import UserError
from minka.plan.flops import parameters
from minka.plan.hardware import GPUS, Gpu, find_gpu
from minka.plan.load_config import load_run
from minka.plan.memory import predict_memory
from minka.plan.memory_kinds import MEMORY_KINDS

MARGIN = 0.08  # of the GPU: CUDA's context, NCCL's buffers, holes between allocations


def memory_plan(run: str, overrides: Sequence[str], world: int, gpu_name: str = "") -> dict[str, Any]:
    """The memory of the first of `world` ranks, under the keys of the JSON. Raises UserError."""
    gpu = _gpu(gpu_name) if gpu_name else None
    config = load_run(run, overrides).config
    found = predict_memory(config, world)
    rank: dict[str, Any] = {
        "rank": 0,
        "moment": found.moment,
        "peak_bytes": found.total,
        "peak_bytes_by_kind": found.by_kind,
    }
    if gpu:
        size = gpu.memory_gb * 10**9
        rank |= {"margin_bytes": size - found.total, "fits": size - found.total >= MARGIN * size}
    layout = config.check(world)
    about = {"world": world, "parameters": parameters(config.model), "layout": layout.model_dump(mode="json")}
    return {
        **about,
        "gpu": gpu.name if gpu else None,
        "gpu_bytes": gpu.memory_gb * 10**9 if gpu else None,
        "ranks": [rank],
    }


def _gpu(name: str) -> Gpu:
    gpu = find_gpu(name)
    if gpu is None:
        known = [one.name for one in GPUS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise UserError(f"no GPU {name!r} is known", where="--gpu", remedy=f"known: {', '.join(near)}")
    return gpu


def memory_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    (rank,) = found["ranks"]
    rows = [[f"rank 0 of {found['world']:,}", "GiB", f"largest at: {rank['moment']}"]]
    rows += [[f"  {kind}", f"{rank['peak_bytes_by_kind'][kind] / 2**30:.2f}", ""] for kind in MEMORY_KINDS]
    rows.append(["peak", f"{rank['peak_bytes'] / 2**30:.2f}", "blocks not compiled"])
    if found["gpu"]:
        share = rank["margin_bytes"] / found["gpu_bytes"]
        verdict = "fits" if rank["fits"] else "does not fit" if share < 0 else "fits without room for CUDA and NCCL"
        rows.append([found["gpu"], f"{found['gpu_bytes'] / 2**30:.2f}", f"{verdict}: {share:.0%} left"])
    return rows
