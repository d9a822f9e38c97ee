"""Seconds of a step on a machine: what a rank computes, what it waits for, by kind.

Each part is (work) / (rate of the data sheet x share of it that is reached); the shares are Rates, tabulated or fitted
to measured runs. Collectives of FSDP may hide behind the compute they are next to; those of tensor and context groups
never do, because the next operation needs them.
"""

from typing import NamedTuple

from minka.plan.bubble import Stage, bubble_seconds, busy_seconds
from minka.plan.collective_time import Group, message_seconds, passes_seconds
from minka.plan.machine import Machine
from minka.plan.step_work import (
    Job,
    Work,
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


def compute_seconds(work: Work, machine: Machine, world: int) -> dict[str, float]:
    """Return the seconds of a pass by COMPUTE. On a GPU launches are hidden by a queue, up to what they cost more."""
    rates, crowd = machine.rates, machine.crowded(world)
    found = {
        "matrix": crowd * work.matrix_flops / (machine.peak_flops * rates.matrix),
        "attention": crowd * work.attention_flops / (machine.peak_flops * rates.attention),
        "memory": crowd * work.moved_bytes / (machine.bandwidth_tb * 1e12 * rates.memory),
    }
    launch = crowd * work.layers * rates.layer_seconds
    return found | {"launch": launch if machine.cores else max(0.0, launch - sum(found.values()))}


def step_time(job: Job, machine: Machine) -> StepTime:
    """Return the time of one step. Raises UserError where the machine's description lacks a link that it needs."""
    layout, m = job.layout, job.micro_batches
    passes = _Passes(job, machine)
    stages = [passes.stage(number) for number in range(len(job.stage_layers))]
    busy = busy_seconds(layout, stages)
    rank = busy.index(max(busy))
    held = layout.stages_of_rank(rank)
    found = dict.fromkeys(KINDS, 0.0)
    for number in held:
        for kind, seconds in passes.by_kind(number).items():
            found[kind] += m * seconds
    found["bubble"] = bubble_seconds(layout, stages)
    layers = sum(job.stage_layers[number] for number in held)
    ends = (0 in held) + (len(stages) - 1 in held)
    weights = layers * block_weights(job) + end_weights(job) * (ends / 2 if len(stages) > 1 else 1)
    forward = sum(stages[number].forward for number in held)
    backward = sum(stages[number].inputs + stages[number].weights for number in held)
    found["shard"], found["replicate"] = _data_parallel(job, machine, weights, layers, forward, backward)
    ways = layout.shard * layout.context
    moved = weights / ways * (job.update_bytes + 4)  # and the norm reads fp32 gradients
    found["optimizer"] = machine.crowded(layout.world) * moved / (machine.bandwidth_tb * 1e12 * machine.rates.memory)
    return StepTime(found)


class _Passes:
    """The passes of one micro-batch through a stage."""

    def __init__(self, job: Job, machine: Machine) -> None:
        self.job, self.machine, world = job, machine, job.layout.world
        self.forward = compute_seconds(block_forward(job), machine, world)
        self.backward = compute_seconds(block_backward(job).plus(recomputed(job)), machine, world)
        self.first = compute_seconds(embedding_work(job), machine, world)
        self.last = compute_seconds(head_work(job), machine, world)
        self.waits = self._waits()

    def _waits(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds for which a block waits for its groups, forward and backward."""
        job, layout, machine = self.job, self.job.layout, self.machine
        hidden = job.tokens * job.shape.d_model * job.element_bytes
        again = 0 if layout.recompute == "none" else 1
        tensor = passes_seconds(machine, Group.of(layout, "tensor"), 4 * hidden, 4)
        keys = 2 * layout.micro_batch * job.seq_len * job.shape.kv_width // layout.tensor * job.element_bytes
        context = passes_seconds(machine, Group.of(layout, "context"), keys, 1)
        crowd = machine.crowded(layout.world)
        tensor, context = crowd * tensor, crowd * context
        if job.tensor_overlaps:
            tensor *= machine.rates.exposed
        forward = {"tensor": tensor, "context": context}
        # Recomputation gathers twice and scatters once more in a block (docs/numbers.md); keys once more.
        return forward, {"tensor": tensor * (1 + 0.75 * again), "context": context * (1 + again)}

    def _message(self) -> float:
        job, layout = self.job, self.job.layout
        payload = job.tokens * job.shape.d_model // layout.tensor * job.element_bytes
        return self.machine.crowded(layout.world) * message_seconds(self.machine, Group.of(layout, "pipeline"), payload)

    def by_kind(self, number: int) -> dict[str, float]:
        """Seconds of a micro-batch in a stage, forward and backward."""
        layers, stages = self.job.stage_layers[number], len(self.job.stage_layers)
        found = {kind: layers * (self.forward[kind] + self.backward[kind]) for kind in COMPUTE}
        for kind in ("tensor", "context"):
            found[kind] = layers * (self.waits[0][kind] + self.waits[1][kind])
        for there, work in ((number == 0, self.first), (number == stages - 1, self.last)):
            for kind in COMPUTE:
                found[kind] += work[kind] * there
        messages = (number > 0) + (number < stages - 1)
        return found | {"pipeline": 2 * messages / 2 * self._message()}

    def stage(self, number: int) -> Stage:
        """Seconds of a micro-batch in a stage, as a schedule sees them."""
        layers, total = self.job.stage_layers[number], sum(self.by_kind(number).values())
        forward = layers * (sum(self.forward.values()) + sum(self.waits[0].values()))
        forward += sum(self.first.values()) * (number == 0)
        forward += sum(self.last.values()) / 3 * (number == len(self.job.stage_layers) - 1)
        weights = layers * self.backward["matrix"] / 2 if self.job.layout.recompute == "none" else 0.0
        weights = layers * self.forward["matrix"] if self.job.layout.splits_backward else weights
        return Stage(forward, total - forward - weights, weights)


def _data_parallel(
    job: Job, machine: Machine, weights: float, layers: int, forward: float, backward: float
) -> tuple[float, float]:
    """Return the seconds that a step waits for FSDP and for replicas. forward, backward: of one micro-batch."""
    layout, m = job.layout, job.micro_batches
    group = Group.of(layout, "shard", "context")
    calls = (job.units or layers) + 1
    gather = passes_seconds(machine, group, weights * job.element_bytes, calls)
    reduce = passes_seconds(machine, group, weights * job.reduce_bytes, calls)
    replicas = Group.of(layout, "replicate")
    share = weights * job.reduce_bytes / group.ranks
    copies = passes_seconds(machine, replicas, share, calls, passes=2)
    if machine.cores:
        gather, reduce, copies = (machine.crowded(layout.world) * part for part in (gather, reduce, copies))

    def exposed(seconds: float, behind: float) -> float:
        """What a step waits for collectives next to `behind` seconds of compute; the first unit has nothing to hide."""
        first = seconds / calls
        rest = seconds - first
        return first + max(0.0, rest - behind) + machine.rates.exposed * min(rest, behind)

    gathers = m if job.freed else 1
    shard = gathers * exposed(gather, forward) + (m * exposed(gather, backward) if job.freed else 0.0)
    reduces = m if job.reduce_each else 1
    shard += reduces * exposed(reduce, max(0.0, backward - (gather if job.freed else 0.0)))
    return shard, exposed(copies, backward)
