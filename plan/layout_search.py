"""The fastest layouts that fit: all legal ones, in the order of what their step takes at least, until enough are found.

A candidate comes up first with a bound, then with its predicted time, then with its predicted memory; whatever comes up
next is the fastest of those that are left. So the answer is that of predicting every layout.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from minka.plan.cluster import Cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout import Layout
from minka.plan.layout_candidates import NOTHING, Candidate, Candidates
from minka.plan.run_job import job_of, on_cluster
from minka.plan.step_time import StepTime, step_time

MARGIN = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, holes between allocations
MOST_CHECKS = 4000  # predictions of memory, before a search gives up


class Found(NamedTuple):
    """A layout that fits."""

    layout: Layout
    time: StepTime
    peak_bytes: int


class Search(NamedTuple):
    """What a search found, and what it went through."""

    found: list[Found]
    searched: int
    pruned: dict[str, int]


Peak = Callable[[RunConfig, int, float], int]


def search(
    config: RunConfig, world: int, cluster: Cluster, top: int, peak: Peak, pinned: Mapping[str, Any] = NOTHING
) -> Search:
    """Return the `top` fastest layouts that fit, each with the best of its ways to replicate, shard and reduce.

    `peak` predicts a run's largest peak in bytes on `world` ranks, or one above the room that is given. `pinned` has
    settings that are decided. Raises UserError where no legal layout fits.
    """
    config = on_cluster(config.after_warmup(), cluster)
    if config.layout.engine == "deepspeed" or config.layout.offload != "none":
        remedy = 'set layout.engine="fsdp" and layout.offload="none"'
        raise UserError("layouts are searched for FSDP on devices only", where="minka plan layout", remedy=remedy)
    room = (1 - MARGIN) * cluster.memory_bytes
    asked = Candidates(config, world, cluster, room, pinned)
    found: list[Found] = []
    checks = 0
    seen = set[object]()
    for candidate, time in _in_order(config, cluster, asked):
        if len(found) == top:
            break
        key = (candidate.cut[0], candidate.cut[3:], candidate.way[:4])
        if key in seen:
            continue
        layout = candidate.layout(config.layout)
        checks += 1
        size = peak(config.model_copy(update={"layout": layout}), world, room)
        if size > room:
            asked.pruned["memory"] += 1
        else:
            seen.add(key)
            found.append(Found(layout, time, size))
        if checks >= MOST_CHECKS:
            left = asked.searched - asked.pruned["memory"] - len(found)
            asked.pruned[f"not looked at, after {MOST_CHECKS:,} predictions of memory"] += left
            break
    if not found:
        raise _nothing_fits(config, world, cluster, asked)
    return Search(found, asked.searched, dict(sorted(asked.pruned.items())))


def _in_order(config: RunConfig, cluster: Cluster, asked: Candidates) -> Iterator[tuple[Candidate, StepTime]]:
    """Yield candidates by rising predicted time."""
    heap: list[tuple[float, int, Candidate, StepTime | None]] = []
    for number, candidate in enumerate(asked):
        heap.append((candidate.seconds, number, candidate, None))
    heapq.heapify(heap)
    while heap:
        _, number, candidate, time = heap[0]
        if time is None:
            exact = step_time(job_of(config, candidate.layout(config.layout), cluster), cluster)
            heapq.heapreplace(heap, (exact.seconds, number, candidate, exact))
        else:
            heapq.heappop(heap)
            yield candidate, time


def _nothing_fits(config: RunConfig, world: int, cluster: Cluster, asked: Candidates) -> UserError:
    if not asked.pruned["memory"]:
        return UserError(
            f"no layout of {config.run.name} is legal on {world:,} ranks",
            where="minka plan layout",
            why=", ".join(f"{count:,} {reason}" for reason, count in asked.pruned.items()),
            remedy=_other(asked) + "give a number of ranks that divides the batch, or a larger data.batch_tokens",
        )
    return UserError(
        f"no legal layout of {config.run.name} on {world:,} {cluster.name} fits",
        where="minka plan layout",
        why=f"each would hold more than {1 - MARGIN:.0%} of {cluster.memory_gb:,.0f} GB on some rank",
        remedy=_other(asked) + "give more ranks (--world), a GPU with more memory, a shorter data.seq_len, or "
        "optimizer.weights=bf16 optimizer.moments=bf16",
    )


def _other(asked: Candidates) -> str:
    pinned = ", ".join(f"layout.{key}={value}" for key, value in asked.pinned.items())
    return f"leave out {pinned}, or " if pinned else ""
