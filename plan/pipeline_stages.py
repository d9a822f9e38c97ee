"""Which layers a pipeline's stages hold: as balanced as consecutive layers allow, or as the layout says."""

from functools import cache

from minka.plan.config_sections import ModelSection
from minka.plan.flops import Shape
from minka.plan.layout import Layout


def stages_of(layout: Layout, model: ModelSection) -> list[range]:
    """Layers of each stage, in order. The first stage has the embedding besides, the last the final norm and head."""
    if layout.stages and layout.pipeline > 1:
        counts = [int(count) for count in layout.stages.split(",")]
    else:
        counts = list(balanced(model.layers, layout.stage_count, *costs(model)))
    ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def costs(model: ModelSection) -> tuple[int, int]:
    """(a layer, embedding or head) in multiplications a token, attention left out.

    The embedding multiplies nothing, but counts as the head does: it holds as many weights and moments, and the first
    stage keeps the most activations.
    """
    return Shape.of(model).layer_matrices, model.vocab * model.d_model


def balanced(layers: int, stages: int, layer: int, end: int) -> tuple[int, ...]:
    """Counts of consecutive layers, none of them 0, whose dearest stage is as cheap as can be.

    Of the splits that are equally good, the one whose stages differ least from one another in cost.
    """
    ends = [end * ((stage == 0) + (stage == stages - 1)) for stage in range(stages)]

    @cache
    def best(stage: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """(dearest, sum of squares, counts) of the stages from `stage` on, which share `left` layers."""
        if stage == stages - 1:
            cost = left * layer + ends[stage]
            return cost, cost * cost, (left,)
        found = None
        for count in range(1, left - (stages - stage - 1) + 1):
            cost = count * layer + ends[stage]
            dearest, squares, counts = best(stage + 1, left - count)
            candidate = (max(cost, dearest), squares + cost * cost, (count, *counts))
            found = candidate if found is None or candidate < found else found
        assert found is not None  # stages <= layers (plan/layout.py)
        return found

    return best(0, layers)[2]
