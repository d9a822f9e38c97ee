"""How long a pipeline's ranks wait for each other in a step, from how long their stages take."""

from typing import NamedTuple

from minka.plan.layout import Layout


class StageSeconds(NamedTuple):
    """Seconds of one micro-batch in a stage. Backward is split where a schedule wants that."""

    forward: float
    inputs: float  # backward up to the gradient of its input, with what is computed again for it
    weights: float  # the gradients of its weights

    @property
    def total(self) -> float:
        """Seconds of all three."""
        return self.forward + self.inputs + self.weights


def busy_seconds(layout: Layout, stages: list[StageSeconds]) -> list[float]:
    """Return how long each rank of a pipeline works on one micro-batch, over all its stages."""
    return [sum(stages[stage].total for stage in layout.stages_of_rank(rank)) for rank in range(layout.pipeline)]


def bubble_seconds(layout: Layout, stages: list[StageSeconds], count: int) -> float:
    """Return how long the busiest rank waits in a step of `count` micro-batches: while a pipeline fills and drains.

    GPipe and 1F1B: one pass through the stages of all other ranks (arXiv:2104.04473, section 2.2). Interleaved: through
    one stage of each (the same). ZBV: arXiv:2401.10241, section 6; DualPipeV: the DualPipe repository; both as torch's
    own order of the passes comes out (tests/plan/test_bubble.py), which has no overlap of forward and backward. With
    fewer micro-batches than ranks each round through all stages takes as long as one micro-batch does.
    """
    if layout.pipeline == 1:
        return 0.0
    busy = busy_seconds(layout, stages)
    p, rounds = layout.pipeline, len(stages) // layout.pipeline
    if not layout.splits_backward:
        filling = (sum(busy) - max(busy)) / rounds
        return filling + (rounds - 1) * max(0.0, sum(busy) - count * max(busy)) / rounds
    f, i, w = (sum(stage[part] for stage in stages) / len(stages) for part in range(3))
    each = max(f, i, f + 2 * i - 3 * w) if layout.schedule == "zbv" else f + 2 * i - w
    alone = 2 * p * (f + i) + 2 * w + (count - 1) * (f + i + 2 * w) - count * max(busy)
    return max((p - 1) * each, alone)
