"""Which layers a pipeline's stages hold: balanced by cost, or as `layout.stages` says."""

from functools import cache

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


def balanced(layers: int, stages: int, layer: int, end: int) -> tuple[int, ...]:
    """Return the layers of each stage, at least one, that make the most expensive stage cheapest.

    Of equally good splits, it is the one with the smallest sum of squared costs.
    """
    at_end = [end * ((stage == 0) + (stage == stages - 1)) for stage in range(stages)]

    @cache
    def best(stage: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """Return (largest cost, sum of squares, counts) of the stages from `stage` on, which share `left` layers."""
        if stage == stages:
            return 0, 0, ()
        found = []
        for count in range(1, left - (stages - stage - 1) + 1) if stage < stages - 1 else [left]:
            cost = count * layer + at_end[stage]
            largest, squares, counts = best(stage + 1, left - count)
            found.append((max(cost, largest), squares + cost * cost, (count, *counts)))
        return min(found)  # there is one: stages <= layers (plan/layout_rules.py)

    return best(0, layers)[2]
