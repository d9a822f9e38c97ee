"""Which combinations of settings cannot be run: one table. docs/parallelism.md lists the same combinations.

Templates are filled in with a run's sections (`{layout.tensor}`), the setting to blame (`{key}={value}`), and what the
rule computes (`{detail}`).
"""

from collections.abc import Callable
from typing import NamedTuple

from minka.plan.config_sections import DataSection, KernelsSection, ModelSection, OptimizerSection
from minka.plan.errors import UserError
from minka.plan.layout import AXES, STAGES_PER_RANK, Layout, counted, divisors, micro_batches, micro_batches_fit


class Asked(NamedTuple):
    """What the rules look at. While `layout.shard` is 0, rules that depend on it are not broken."""

    layout: Layout
    model: ModelSection
    data: DataSection
    kernels: KernelsSection
    optimizer: OptimizerSection


class LayoutRule(NamedTuple):
    """A combination that cannot be run: the setting in [layout] that it is about, and the error's parts as templates.

    `where` names the setting to blame.
    """

    key: str
    broken: Callable[[Asked], object]  # false, or what the templates call {detail}
    why: str
    remedy: str
    what: str = "{key}={value!r} cannot be run with these settings"
    where: str = "layout.{key}"


def check_layout(asked: Asked) -> None:
    """Raise UserError for the first rule that a run breaks, with the setting, the reason and what would work."""
    for rule in RULES:
        detail = rule.broken(asked)
        if detail:
            named = {"key": rule.key, "value": getattr(asked.layout, rule.key), "detail": detail, **asked._asdict()}
            parts = (rule.what, rule.where, rule.why, rule.remedy)
            what, where, why, remedy = (part.format(**named) for part in parts)
            raise UserError(what, where=where, why=why, remedy=remedy)


def _tensor_divides(size: str, why: str) -> LayoutRule:
    return LayoutRule(
        "tensor",
        broken=lambda a: getattr(a.model, size) % a.layout.tensor and _tensor_ways(a),
        why=why,
        remedy="works with this model: tensor in {detail}; raise layout.shard or layout.pipeline to use more ranks",
        what=f"tensor={{value}} does not divide model.{size}={{model.{size}}}",
    )


def _tensor_ways(asked: Asked, *more: int) -> list[int]:
    return divisors(asked.model.heads, asked.model.kv_heads, asked.model.d_ff, asked.model.vocab, *more)


def _rank_tokens(asked: Asked) -> int:
    return asked.data.seq_len // asked.layout.context


def _right_stages(asked: Asked) -> str:
    """An example of layout.stages, where it is wrong."""
    layout, layers, words = asked.layout, asked.model.layers, asked.layout.stages.split(",")
    counts = [int(word) for word in words if word.isascii() and word.strip().isdecimal() and int(word) > 0]
    right = len(counts) == len(words) == layout.stage_count and sum(counts) == layers
    if not layout.stages or layout.pipeline == 1 or right:
        return ""
    each, more = divmod(layers, layout.stage_count)
    return ",".join(str(each + (stage < more)) for stage in range(layout.stage_count))


def _right_stages_per_rank(asked: Asked) -> str:
    """The stages on each rank, in words, where layout.stages_per_rank is wrong."""
    layout, needed = asked.layout, STAGES_PER_RANK[asked.layout.schedule]
    if layout.pipeline == 1 or layout.stages_per_rank in (0, needed):
        return ""
    if layout.schedule == "interleaved":
        return "at least 2 stages" if layout.stages_per_rank < needed else ""
    return counted(needed, "stage")


def _unfit_micro_batches(asked: Asked) -> int:
    """A number of micro-batches that a step of the run has and its schedule cannot run; else 0."""
    if asked.layout.pipeline == 1:
        return 0
    return next((n for n in micro_batches(asked.layout, asked.data) if not micro_batches_fit(asked.layout, n)), 0)


def _bf16_state(asked: Asked) -> str:
    """The setting that makes weights or moments bf16; empty where both are fp32."""
    return next(
        (f"optimizer.{name}" for name in ("weights", "moments") if getattr(asked.optimizer, name) == "bf16"), ""
    )


def _deepspeed(
    key: str,
    broken: Callable[[Asked], object],
    why: str,
    remedy: str,
    setting: str = "{key}={value!r}",
    where: str = "layout.{key}",
) -> LayoutRule:
    return LayoutRule(
        key,
        broken=lambda a: a.layout.engine == "deepspeed" and broken(a),
        why=why,
        remedy=f'{remedy}, or layout.engine="fsdp"',
        what=f"{setting} cannot be run by DeepSpeed",
        where=where,
    )


def _deepspeed_axis(axis: str) -> LayoutRule:
    return _deepspeed(
        axis,
        broken=lambda a: getattr(a.layout, axis) > 1,
        why="ZeRO cuts over all ranks: it keeps no copies, and does not take weights that are already cut",
        remedy=f"set layout.{axis}=1 and raise layout.shard",
    )


RULES: tuple[LayoutRule, ...] = (
    _tensor_divides("heads", "a rank must own whole query and key/value heads"),
    _tensor_divides("kv_heads", "a rank must own whole query and key/value heads"),
    _tensor_divides("d_ff", "every rank holds equally many of its columns"),
    _tensor_divides("vocab", "every rank holds equally many of its rows"),
    LayoutRule(
        "context",
        broken=lambda a: (
            a.layout.context > 1
            and a.data.seq_len % (2 * a.layout.context)
            and [ways for ways in divisors(a.data.seq_len) if ways == 1 or a.data.seq_len % (2 * ways) == 0]
        ),
        why="each rank takes one part from the head and one from the tail of a sequence, so that causal work is even",
        remedy="works with this length: context in {detail}",
        what="context={value} needs a data.seq_len that is a multiple of 2 x context; it is {data.seq_len}",
    ),
    LayoutRule(
        "tensor",
        broken=lambda a: _rank_tokens(a) % a.layout.tensor and _tensor_ways(a, _rank_tokens(a)),
        why="between attention and feed-forward layers the ranks of a tensor group share a sequence's tokens",
        remedy="works with this length: tensor in {detail}; or set data.seq_len to a multiple of 2 x context x tensor",
        what="tensor={value} does not divide data.seq_len / context = {data.seq_len} / {layout.context}",
    ),
    LayoutRule(
        "pipeline",
        broken=lambda a: a.layout.pipeline > 1 and a.model.tied,
        why="with model.tied=true embedding and head would be the same weights on two stages",
        remedy="set model.tied=false, or pipeline=1 and raise layout.shard or layout.tensor",
    ),
    LayoutRule(
        "stages_per_rank",
        broken=_right_stages_per_rank,
        why="schedule={layout.schedule!r} has {detail} on each rank",
        remedy='leave it out, or set schedule="interleaved" and 2 stages or more',
    ),
    LayoutRule(
        "pipeline",
        broken=lambda a: (
            a.layout.stage_count > a.model.layers
            and max(1, a.model.layers // (a.layout.stage_count // a.layout.pipeline))
        ),
        why="every stage needs a layer",
        remedy='with this schedule set pipeline to at most {detail}, or set schedule="1f1b"',
        what="pipeline={value} with schedule={layout.schedule!r} has {layout.stage_count} stages; "
        "model.layers is {model.layers}",
    ),
    LayoutRule(
        "stages",
        broken=_right_stages,
        why="it lists the layers of each stage, at least one, in the order of the stages",
        remedy='set it to "{detail}", for example, or leave it empty to balance stages by cost',
        what="stages={value!r} does not split {model.layers} layers into {layout.stage_count} stages",
    ),
    LayoutRule(
        "reshard",
        broken=lambda a: a.layout.splits_backward and a.layout.reshard == "always",
        why="schedule={layout.schedule!r} takes gradients of weights in a pass of their own: "
        "with freed weights they would be wrong without an error",
        remedy='set reshard="never" or "auto", or schedule="1f1b" or "interleaved"',
    ),
    LayoutRule(
        "schedule",
        broken=lambda a: a.layout.splits_backward and a.kernels.compile,
        why="a compiled block takes both gradients in one pass; split in two they were wrong without an error",
        remedy='set kernels.compile=false, or schedule="1f1b" or "interleaved"',
    ),
    LayoutRule(
        "schedule",
        broken=_unfit_micro_batches,
        why='"1f1b" and "dualpipev" need as many as there are stages, {layout.stage_count}; "interleaved" takes n in '
        "n // pipeline equal rounds: n must be a multiple of {layout.pipeline} or below twice that",
        remedy="change data.batch_tokens (and data.batch_warmup), layout.micro_batch, or the number of data ranks; "
        'schedule="gpipe" runs any number',
        what="schedule={value!r} cannot run the {detail} micro-batches that a rank has in a step",
    ),
    *(_deepspeed_axis(axis) for axis in AXES if axis != "shard"),
    LayoutRule(
        "offload",
        broken=lambda a: a.layout.engine == "fsdp" and a.layout.offload == "optimizer",
        why="FSDP moves weights, gradients and moments to the host's memory together",
        remedy='set layout.offload="all", or layout.engine="deepspeed"',
    ),
    _deepspeed(
        "offload",
        broken=lambda a: a.layout.offload == "all" and a.layout.zero_stage < 3,
        why="ZeRO stage {layout.zero_stage} keeps the weights whole on the device",
        remedy='set layout.zero_stage=3, layout.offload="optimizer"',
    ),
    _deepspeed(
        "precision",
        broken=lambda a: a.layout.precision == "fp64",
        why="its partitions of weights and moments are fp32",
        remedy='set layout.precision="fp32"',
    ),
    _deepspeed(
        "engine",
        broken=_bf16_state,
        why="its partitions of weights and moments are fp32",
        remedy='set optimizer.weights="fp32" and optimizer.moments="fp32"',
        setting="bf16",
        where="{detail}",
    ),
    LayoutRule(
        "precision",
        broken=lambda a: a.layout.precision == "fp64" and _bf16_state(a),
        why="fp64 is for weights and moments too",
        remedy='set optimizer.weights="fp32" and optimizer.moments="fp32", or a different layout.precision',
        what="bf16 cannot be combined with layout.precision={value!r}",
        where="{detail}",
    ),
    LayoutRule(
        "reduce",
        broken=lambda a: (
            a.optimizer.weights == "bf16"
            and a.layout.reduce == "micro_batch"
            and max(micro_batches(a.layout, a.data), default=1) > 1
        ),
        why="gradients of bf16 weights are bf16 once they are summed over ranks, and would be rounded again each time",
        remedy='set layout.reduce="step", raise layout.micro_batch, or set optimizer.weights="fp32"',
    ),
    _deepspeed(
        "reshard",
        broken=lambda a: a.layout.reshard != "auto",
        why="whether gathered weights are freed follows from the stage: 3 frees them, 1 and 2 keep them whole",
        remedy='set layout.reshard="auto" and layout.zero_stage',
    ),
    _deepspeed(
        "reduce",
        broken=lambda a: a.layout.reduce != "step",
        why="when gradients are summed follows from the stage: 1 sums once a step, 2 and 3 after each micro-batch",
        remedy='set layout.reduce="step" and layout.zero_stage',
    ),
    LayoutRule(
        "reduce",
        broken=lambda a: a.layout.pipeline > 1 and a.layout.reduce != "step",
        why="with pipeline={layout.pipeline} a stage's gradients are summed after its last micro-batch",
        remedy='set layout.reduce="step" (more stages have fewer gradients each), or pipeline=1',
    ),
    _deepspeed(
        "zero_stage",
        broken=lambda a: a.layout.zero_stage == 3 and a.kernels.compile,
        why="it gathers and frees weights in hooks within a block, which kernels.compile=true cannot hold in one graph",
        remedy="set kernels.compile=false, layout.zero_stage=2",
    ),
    _deepspeed(
        "recompute",
        broken=lambda a: a.layout.zero_stage == 3 and a.layout.recompute == "selective",
        why="it gathers weights in hooks within a block, and not the same ones when the block is computed again",
        remedy='set layout.recompute="block", or layout.zero_stage=2',
    ),
)
