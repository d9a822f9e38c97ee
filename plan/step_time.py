"""Seconds of a step on a cluster: what a rank computes, what it waits for, by kind.

Each part is (work) / (rate of the data sheet x share of it that is reached); the shares are Rates, tabulated or fitted
to measured runs. Collectives of FSDP may hide behind the compute they are next to; those of tensor and context groups
do not, because the next operation needs them.
"""

from functools import lru_cache
from typing import NamedTuple

from minka.plan.bubble import StageSeconds, bubble_seconds, busy_seconds
from minka.plan.cluster import Cluster
from minka.plan.collective_time import Group, message_seconds, passes_seconds
from minka.plan.step_work import (
    Part,
    PassWork,
    StepJob,
    block_backward,
    block_forward,
    block_weights,
    embedding_work,
    end_weights,
    head_work,
    recomputed,
)

# Kinds of a breakdown, in the order they are printed.
COMPUTE = ("matrix", "attention", "memory", "launch")
WAITS = ("tensor", "context", "shard", "replicate", "pipeline", "bubble")
KINDS = (*COMPUTE, *WAITS, "optimizer")


class StepTime(NamedTuple):
    """Seconds of a step of the busiest rank, by KINDS."""

    breakdown: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return sum(self.breakdown.values())


class PassSeconds(NamedTuple):
    """Seconds of one pass over a micro-batch, by kind."""

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self)


class PartSeconds(NamedTuple):
    """The passes of a block, and forward and backward of the model's ends."""

    forward: PassSeconds
    backward: PassSeconds
    embedding: PassSeconds
    head: PassSeconds


def computing(work: PassWork, cluster: Cluster, crowd: float) -> PassSeconds:
    """Return the seconds of a pass without its waits. On a GPU a queue hides launches behind what was launched."""
    rates = cluster.rates
    matrix = crowd * work.matrix_flops / (cluster.peak_flops * rates.matrix)
    attention = crowd * work.attention_flops / (cluster.peak_flops * rates.attention)
    memory = crowd * work.moved_bytes / (cluster.bandwidth_tb * 1e12 * rates.memory)
    launch = crowd * work.layers * rates.layer_seconds
    if not cluster.cores:
        launch = max(0.0, launch - matrix - attention - memory)
    return PassSeconds(matrix, attention, memory, launch)


@lru_cache(maxsize=65536)
def part_seconds(part: Part, cluster: Cluster, crowd: float) -> PartSeconds:
    """Return the seconds of a part's passes; a search asks for the same ones again and again."""
    hidden = part.tokens * part.shape.d_model * part.element_bytes
    tensor = crowd * passes_seconds(cluster, Group(part.tensor, 1), 4 * hidden, 4)
    if part.tensor_overlaps:
        tensor *= cluster.rates.exposed
    keys = 2 * part.micro_batch * part.seq_len * part.shape.kv_width // part.tensor * part.element_bytes
    context = crowd * passes_seconds(cluster, Group(part.context, part.tensor), keys, 1)
    forward = computing(block_forward(part), cluster, crowd)._replace(tensor=tensor, context=context)
    backward = computing(block_backward(part).plus(recomputed(part)), cluster, crowd)
    if part.recompute != "none":  # hidden states are gathered twice more and scattered once, keys gathered once more
        tensor, context = (1.5 if part.recompute == "selective" else 1.75) * tensor, 2 * context
    ends = (computing(work(part), cluster, crowd) for work in (embedding_work, head_work))
    return PartSeconds(forward, backward._replace(tensor=tensor, context=context), *ends)


def step_time(job: StepJob, cluster: Cluster) -> StepTime:
    """Return the time of one step. Raises UserError where the cluster's description lacks a link that it needs."""
    layout, part, crowd = job.layout, job.part, cluster.crowded(job.layout.world)
    times = part_seconds(part, cluster, crowd)
    payload = part.tokens * part.shape.d_model // part.tensor * part.element_bytes
    message = crowd * message_seconds(cluster, Group.of(layout, "pipeline"), payload)
    stages = _stages(job, times, message)
    busy = busy_seconds(layout, stages)
    held = layout.stages_of_rank(busy.index(max(busy)))
    layers, last = sum(job.stage_layers[number] for number in held), len(stages) - 1
    found = dict.fromkeys(KINDS, 0.0)
    ends = [*([times.embedding] * (0 in held)), *([times.head] * (last in held))]
    for kind, forward, backward, *of_ends in zip(
        PassSeconds._fields, times.forward, times.backward, *ends, strict=True
    ):
        found[kind] = job.micro_batches * (layers * (forward + backward) + sum(of_ends))
    found["pipeline"] = job.micro_batches * message * sum((number > 0) + (number < last) for number in held)
    found["bubble"] = bubble_seconds(layout, stages, job.micro_batches)
    own_ends = end_weights(part) * (len(ends) / 2 if last else 1)
    weights = layers * block_weights(part) + own_ends
    forward = sum(stages[number].forward for number in held)
    backward = sum(stages[number].inputs + stages[number].weights for number in held)
    found["shard"], found["replicate"] = _data_parallel(job, cluster, (weights, own_ends), layers, forward, backward)
    moved = weights / (layout.shard * layout.context) * (job.update_bytes + 4)  # the norm reads fp32 gradients
    found["optimizer"] = crowd * moved / (cluster.bandwidth_tb * 1e12 * cluster.rates.memory)
    return StepTime(found)


def _stages(job: StepJob, times: PartSeconds, message: float) -> list[StageSeconds]:
    """Seconds of a micro-batch in each stage, as a schedule sees them."""
    forward, backward, last = times.forward.total, times.backward.total, len(job.stage_layers) - 1
    # Of a block: the gradients of its weights. What is computed again is so for both, in one pass (parallel/).
    whole = not job.layout.splits_backward or job.part.recompute != "none"
    split = 0.0 if whole else times.forward.matrix
    found = []
    for number, layers in enumerate(job.stage_layers):
        there = layers * forward + message * (number > 0)
        back = layers * (backward - split) + message * (number < last)
        if number == 0:
            there += times.embedding.total
        if number == last:
            there, back = there + times.head.total / 3, back + times.head.total * 2 / 3
        found.append(StageSeconds(there, back, layers * split))
    return found


def _data_parallel(
    job: StepJob, cluster: Cluster, held: tuple[float, float], layers: int, forward: float, backward: float
) -> tuple[float, float]:
    """Return the seconds that a step waits for FSDP and for replicas.

    held: a rank's weights, and those of embedding and head among them, which are gathered once. forward, backward: of
    one micro-batch.
    """
    weights, ends = held
    layout, m, crowd = job.layout, job.micro_batches, cluster.crowded(job.layout.world)
    group = Group.of(layout, "shard", "context")
    calls = (job.units or layers) + 1
    gather = crowd * passes_seconds(cluster, group, (weights - ends) * job.part.element_bytes, calls)
    once = crowd * passes_seconds(cluster, group, ends * job.part.element_bytes, 1)
    reduce = crowd * passes_seconds(cluster, group, weights * job.reduce_bytes, calls)
    share = weights * job.reduce_bytes / group.ranks
    copies = crowd * passes_seconds(cluster, Group.of(layout, "replicate"), share, calls, passes=2)

    def exposed(seconds: float, behind: float) -> float:
        """What a step waits for collectives next to `behind` seconds of compute; the first unit has nothing to hide."""
        first = seconds / calls
        rest = seconds - first
        return first + max(0.0, rest - behind) + cluster.rates.exposed * min(rest, behind)

    gathers = m if job.freed else job.gathers
    shard = once + gathers * exposed(gather, forward) + (m * exposed(gather, backward) if job.freed else 0.0)
    reduces = m if job.reduce_each else 1
    shard += reduces * exposed(reduce, max(0.0, backward - (gather if job.freed else 0.0)))
    return shard, exposed(copies, backward)
