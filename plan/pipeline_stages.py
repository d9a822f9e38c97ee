"""Which layers a pipeline's stages hold: balanced by cost, or as `layout.stages` says."""

from functools import lru_cache
from heapq import heapify, heapreplace

from minka.plan.config_sections import ModelSection
from minka.plan.flops import Shape
from minka.plan.layout import Layout


def stages_of(layout: Layout, model: ModelSection) -> list[range]:
    """Return the layers of each stage. The first also has the embedding, the last the final norm and the head."""
    if layout.stages and layout.pipeline > 1:
        counts = [int(count) for count in layout.stages.split(",")]
    else:
        counts = list(balanced(model.layers, layout.stage_count, *costs(model)))
    ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def costs(model: ModelSection) -> tuple[int, int]:
    """Return the cost of a layer, and of embedding or head, in multiplications a token without attention.

    The embedding multiplies nothing, but is given the head's cost: it holds as many weights and moments, and the first
    stage keeps the most activations.
    """
    return Shape.of(model).layer_matrices(1), model.vocab * model.d_model


@lru_cache(maxsize=4096)
def balanced(layers: int, stages: int, layer: int, end: int) -> tuple[int, ...]:
    """Return the layers of each stage, at least one, that make the most expensive stage cheapest.

    Of equally good splits, it is the one with the smallest sum of squared costs; and of those, the one with fewer
    layers in earlier stages. One layer after the other goes to the stage that is cheapest so far.
    """
    counts = [1] * stages  # stages <= layers (plan/layout_rules.py)
    cheapest = [(layer + end * ((stage == 0) + (stage == stages - 1)), -stage) for stage in range(stages)]
    heapify(cheapest)
    for _ in range(layers - stages):
        cost, stage = cheapest[0]
        counts[-stage] += 1
        heapreplace(cheapest, (cost + layer, stage))
    return tuple(counts)
