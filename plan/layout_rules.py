"""Which combinations of settings cannot be run: one table. docs/parallelism.md lists the same combinations.

Templates are filled in with a run's sections (`{layout.tensor}`) and with `{detail}`, which the rule computes.
"""

from collections.abc import Callable
from typing import NamedTuple

from minka.plan.config_sections import DataSection, KernelsSection, ModelSection
from minka.plan.errors import UserError
from minka.plan.layout import AXES, STAGES_PER_RANK, Layout, divisors, even, micro_batches, micro_batches_fit


class Asked(NamedTuple):
    """What the rules look at. While `layout.shard` is 0, rules that depend on it are not broken."""

    layout: Layout
    model: ModelSection
    data: DataSection
    kernels: KernelsSection


class Rule(NamedTuple):
    """A combination that cannot be run: the setting in [layout] to blame, and the error's parts as templates."""

    key: str
    broken: Callable[[Asked], bool]
    what: str
    why: str
    remedy: str
    detail: Callable[[Asked], object] = lambda _: ""


def check_layout(asked: Asked) -> None:
    """Raise UserError for the first rule that a run breaks, with the setting, the reason and what would work."""
    for rule in RULES:
        if rule.broken(asked):
            values = {**asked._asdict(), "detail": rule.detail(asked)}
            what, why, remedy = (part.format(**values) for part in (rule.what, rule.why, rule.remedy))
            raise UserError(what, where=f"layout.{rule.key}", why=why, remedy=remedy)


def _tensor_ways(asked: Asked, *more: int) -> list[int]:
    m = asked.model
    return divisors(m.heads, m.kv_heads, m.d_ff, m.vocab, *more)


def _tensor_divides(size: str, why: str) -> Rule:
    return Rule(
        key="tensor",
        broken=lambda a: getattr(a.model, size) % a.layout.tensor > 0,
        what=f"tensor={{layout.tensor}} does not divide model.{size}={{model.{size}}}",
        why=why,
        remedy="works with this model: tensor in {detail}; raise layout.shard or layout.pipeline to use more ranks",
        detail=_tensor_ways,
    )


def _context_ways(asked: Asked) -> list[int]:
    length = asked.data.seq_len
    return [ways for ways in divisors(length) if ways == 1 or length % (2 * ways) == 0]


def _rank_tokens(asked: Asked) -> int:
    """Tokens of a sequence on each group of ranks that shares a context part."""
    return asked.data.seq_len // asked.layout.context


def _stages_are_wrong(asked: Asked) -> bool:
    layout = asked.layout
    if not layout.stages or layout.pipeline == 1:
        return False
    words = [word.strip() for word in layout.stages.split(",")]
    counts = [int(word) for word in words if word.isascii() and word.isdecimal() and int(word) > 0]
    return not (len(counts) == len(words) == layout.stage_count and sum(counts) == asked.model.layers)


def _unfit_micro_batches(asked: Asked, schedules: tuple[str, ...]) -> list[int]:
    layout = asked.layout
    if layout.pipeline == 1 or layout.schedule not in schedules:
        return []
    return [count for count in micro_batches(layout, asked.data) if not micro_batches_fit(layout, count)]


def _micro_batches(schedules: tuple[str, ...], why: str) -> Rule:
    return Rule(
        key="schedule",
        broken=lambda a: bool(_unfit_micro_batches(a, schedules)),
        what="schedule={layout.schedule!r} cannot run the {detail} micro-batches that a rank has in a step",
        why=why,
        remedy="change data.batch_tokens (and data.batch_warmup), layout.micro_batch, or the number of data ranks; "
        'schedule="gpipe" runs any number',
        detail=lambda a: _unfit_micro_batches(a, schedules)[0],
    )


def _deepspeed(key: str, broken: Callable[[Asked], bool], what: str, why: str, remedy: str) -> Rule:
    """Return a rule for layout.engine="deepspeed", which another engine mends."""
    return Rule(
        key=key,
        broken=lambda a: a.layout.engine == "deepspeed" and broken(a),
        what=what,
        why=why,
        remedy=f'{remedy}, or layout.engine="fsdp"',
    )


def _deepspeed_axis(axis: str) -> Rule:
    return _deepspeed(
        key=axis,
        broken=lambda a: getattr(a.layout, axis) > 1,
        what=f"DeepSpeed cannot run {axis}={{layout.{axis}}}",
        why="ZeRO cuts over all ranks: it keeps no copies, and does not take weights that are already cut",
        remedy=f"set layout.{axis}=1 and raise layout.shard",
    )


RULES: tuple[Rule, ...] = (
    _tensor_divides("heads", "a rank must own whole query and key/value heads"),
    _tensor_divides("kv_heads", "a rank must own whole query and key/value heads"),
    _tensor_divides("d_ff", "every rank holds equally many of its columns"),
    _tensor_divides("vocab", "every rank holds equally many of its rows"),
    Rule(
        key="context",
        broken=lambda a: a.layout.context > 1 and a.data.seq_len % (2 * a.layout.context) > 0,
        what="context={layout.context} needs a data.seq_len that is a multiple of 2 x context; it is {data.seq_len}",
        why="each rank takes one part from the head and one from the tail of a sequence, so that causal work is even",
        remedy="works with this length: context in {detail}",
        detail=_context_ways,
    ),
    Rule(
        key="tensor",
        broken=lambda a: _rank_tokens(a) % a.layout.tensor > 0,
        what="tensor={layout.tensor} does not divide data.seq_len / context = {data.seq_len} / {layout.context}",
        why="between attention and feed-forward layers the ranks of a tensor group share a sequence's tokens",
        remedy="works with this length: tensor in {detail}; or set data.seq_len to a multiple of 2 x context x tensor",
        detail=lambda a: _tensor_ways(a, _rank_tokens(a)),
    ),
    Rule(
        key="pipeline",
        broken=lambda a: a.layout.pipeline > 1 and a.model.tied,
        what="pipeline={layout.pipeline} cannot be combined with model.tied=true",
        why="embedding and head would be the same weights on two stages",
        remedy="set model.tied=false, or pipeline=1 and raise layout.shard or layout.tensor",
    ),
    Rule(
        key="stages_per_rank",
        broken=lambda a: a.layout.pipeline > 1 and a.layout.schedule == "interleaved" and a.layout.stages_per_rank == 1,
        what='stages_per_rank=1 cannot be combined with schedule="interleaved"',
        why="it has at least two stages on each rank",
        remedy="leave it out, or set it to 2 or more",
    ),
    Rule(
        key="stages_per_rank",
        broken=lambda a: (
            a.layout.pipeline > 1
            and a.layout.schedule != "interleaved"
            and a.layout.stages_per_rank not in (0, STAGES_PER_RANK[a.layout.schedule])
        ),
        what="stages_per_rank={layout.stages_per_rank} cannot be combined with schedule={layout.schedule!r}",
        why="it has {detail} on each rank",
        remedy='leave it out, or set schedule="interleaved" for other numbers',
        detail=lambda a: ("one stage", "two stages")[STAGES_PER_RANK[a.layout.schedule] - 1],
    ),
    Rule(
        key="pipeline",
        broken=lambda a: a.layout.stage_count > a.model.layers,
        what="pipeline={layout.pipeline} with schedule={layout.schedule!r} has {layout.stage_count} stages; "
        "model.layers is {model.layers}",
        why="every stage needs a layer",
        remedy='with this schedule set pipeline to at most {detail}, or set schedule="1f1b"',
        detail=lambda a: max(1, a.model.layers // (a.layout.stage_count // a.layout.pipeline)),
    ),
    Rule(
        key="stages",
        broken=_stages_are_wrong,
        what="stages={layout.stages!r} does not split {model.layers} layers into {layout.stage_count} stages",
        why="it lists the layers of each stage, at least one, in the order of the stages",
        remedy='set it to "{detail}", for example, or leave it empty to balance stages by cost',
        detail=lambda a: ",".join(map(str, even(a.model.layers, a.layout.stage_count))),
    ),
    Rule(
        key="reshard",
        broken=lambda a: a.layout.splits_backward and a.layout.reshard == "always",
        what='reshard="always" cannot be combined with schedule={layout.schedule!r}',
        why="gradients of weights are taken in a pass of their own, which would find freed weights: "
        "they would be wrong without an error",
        remedy='set reshard="never" or "auto", or schedule="1f1b" or "interleaved"',
    ),
    Rule(
        key="schedule",
        broken=lambda a: a.layout.splits_backward and a.kernels.compile,
        what="schedule={layout.schedule!r} cannot be combined with kernels.compile=true",
        why="a compiled block takes both gradients in one pass; split in two they have been wrong without an error",
        remedy='set kernels.compile=false, or schedule="1f1b" or "interleaved"',
    ),
    _micro_batches(("1f1b", "dualpipev"), "it needs at least as many as there are stages, {layout.stage_count}"),
    _micro_batches(
        ("interleaved",),
        "it takes n of them in n // pipeline equal rounds, so n is a multiple of {layout.pipeline} or below twice that",
    ),
    *(_deepspeed_axis(axis) for axis in AXES if axis != "shard"),
    Rule(
        key="offload",
        broken=lambda a: a.layout.engine == "fsdp" and a.layout.offload == "optimizer",
        what='offload="optimizer" needs DeepSpeed',
        why="FSDP moves weights, gradients and moments to the host's memory together",
        remedy='set layout.offload="all", or layout.engine="deepspeed"',
    ),
    _deepspeed(
        key="offload",
        broken=lambda a: a.layout.offload == "all" and a.layout.zero_stage < 3,
        what='offload="all" needs ZeRO stage 3, and zero_stage is {layout.zero_stage}',
        why="stages 1 and 2 keep the weights whole on the device",
        remedy='set layout.zero_stage=3, layout.offload="optimizer"',
    ),
    _deepspeed(
        key="precision",
        broken=lambda a: a.layout.precision == "fp64",
        what='DeepSpeed cannot run precision="fp64"',
        why="its partitions of weights and moments are fp32",
        remedy='set layout.precision="fp32"',
    ),
    _deepspeed(
        key="reshard",
        broken=lambda a: a.layout.reshard != "auto",
        what="DeepSpeed has no setting for reshard={layout.reshard!r}",
        why="whether gathered weights are freed follows from the stage: 3 frees them, 1 and 2 keep them whole",
        remedy='set layout.reshard="auto" and layout.zero_stage',
    ),
    _deepspeed(
        key="reduce",
        broken=lambda a: a.layout.reduce != "step",
        what="DeepSpeed has no setting for reduce={layout.reduce!r}",
        why="when gradients are summed follows from the stage: 1 sums once a step, 2 and 3 after each micro-batch",
        remedy='set layout.reduce="step" and layout.zero_stage',
    ),
    Rule(
        key="reduce",
        broken=lambda a: a.layout.pipeline > 1 and a.layout.reduce != "step",
        what="reduce={layout.reduce!r} cannot be combined with pipeline={layout.pipeline}",
        why="a schedule sums a stage's gradients after its last micro-batch",
        remedy='set layout.reduce="step" (more stages have fewer gradients each), or pipeline=1',
    ),
    _deepspeed(
        key="zero_stage",
        broken=lambda a: a.layout.zero_stage == 3 and a.kernels.compile,
        what="zero_stage=3 cannot be combined with kernels.compile=true",
        why="DeepSpeed gathers and frees weights in hooks within a block, which a full graph cannot hold",
        remedy="set kernels.compile=false, layout.zero_stage=2",
    ),
)
