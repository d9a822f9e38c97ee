"""Layout: how one run is cut over ranks, and the rules of what is legal (the only place that knows them).

It is longer than most files because of that: the rules stand side by side, each with its reason and what would work.
"""

from collections.abc import Callable, Iterable
from math import gcd
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from minka.plan.config_sections import DataSection, KernelsSection, ModelSection
from minka.plan.errors import UserError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")  # mesh order, from the slowest link to the fastest
Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]
STAGES_PER_RANK: dict[str, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
V_SHAPED = ("zbv", "dualpipev")  # rank r of p has stages r and 2p - 1 - r, and the backward pass is split in two


class Layout(BaseModel, frozen=True, extra="forbid", strict=True):
    """How many ways each axis of the work is cut; the product is the world size. `shard = 0` means all ranks left."""

    pipeline: int = Field(1, ge=1, description="stages of consecutive layers")
    replicate: int = Field(1, ge=1, description="whole copies of the model (HSDP's outer axis)")
    shard: int = Field(0, ge=0, description="FSDP ways: parameters, gradients, optimizer state; 0 = all ranks left")
    context: int = Field(1, ge=1, description="ways each sequence is split")
    tensor: int = Field(1, ge=1, description="ways each matrix product is split")
    tensor_across_domains: bool = Field(False, description="let a tensor group cross NVLink domains, slow as that is")
    micro_batch: int = Field(1, ge=1, description="sequences a rank takes through the model at once")
    schedule: Schedule = Field("1f1b", description="order of a pipeline's passes")
    stages_per_rank: int = Field(0, ge=0, description="pipeline stages a rank holds; 0 = what the schedule wants")
    stages: str = Field("", description='layers of each stage, "3,4,4,3"; empty: balanced by cost')
    recompute: Literal["none", "block"] = Field("none", description="which activations are recomputed in backward")
    reshard: Literal["auto", "always", "never"] = Field("auto", description="free gathered weights after forward")
    reduce: Literal["step", "micro_batch"] = Field("step", description="sum gradients over shard: once, or each time")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        "auto", description="compute dtype; weights stay fp32. fp64: weights too, to tell a fault from rounding"
    )
    engine: Literal["fsdp", "deepspeed"] = Field("fsdp", description="what cuts weights along shard, and steps")
    zero_stage: Literal[1, 2, 3] = Field(3, description="deepspeed: cut moments (1), gradients (2), weights (3)")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="what is kept in the host's memory")

    @property
    def world(self) -> int:
        """Ranks in all; only for a resolved layout (shard > 0)."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ways(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def stage_count(self) -> int:
        """Stages of the whole pipeline; 1 where there is none."""
        return 1 if self.pipeline == 1 else self.pipeline * (self.stages_per_rank or STAGES_PER_RANK[self.schedule])

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are taken in two passes."""
        return self.pipeline > 1 and self.schedule in V_SHAPED

    def rank_of_stage(self, stage: int) -> int:
        """Coordinate on the pipeline axis of the ranks that hold a stage."""
        if self.pipeline > 1 and self.schedule in V_SHAPED:
            return min(stage, 2 * self.pipeline - 1 - stage)
        return stage % self.pipeline

    def stages_of_rank(self, coordinate: int) -> list[int]:
        """Stages that the ranks at a coordinate of the pipeline axis hold, in the order they run."""
        return [stage for stage in range(self.stage_count) if self.rank_of_stage(stage) == coordinate]

    def resolve(self, ranks: int) -> "Layout":
        """The layout on `ranks` ranks, with shard filled in. Raises UserError when the numbers do not fit."""
        others = self.pipeline * self.replicate * self.context * self.tensor
        shard = self.shard or max(1, ranks // others)
        layout = self.model_copy(update={"shard": shard})
        if layout.world == ranks:
            return layout
        fits = f"axes whose product divides {ranks:,}: {_few(divisors(ranks))}"
        if self.shard:
            cut, verb = f" ({_product(layout)})" if layout.world > 1 else "", "is" if ranks == 1 else "are"
            raise UserError(
                f"the layout is of {counted(layout.world, 'rank')}{cut}, and there {verb} {ranks:,}",
                where="layout",
                why="every rank has exactly one place on the mesh",
                remedy=f"take {counted(layout.world, 'rank')}, or shard=0 (all ranks left) with {fits}",
            )
        below, above = ranks // others * others, -(-ranks // others) * others
        raise UserError(
            f"{_product(self)} does not divide {counted(ranks, 'rank')}",
            where="layout",
            why="every rank has exactly one place on the mesh, and shard=0 takes whatever is left",
            remedy=f"take {f'{below:,} or ' if below else ''}{above:,} ranks, or {fits}",
        )


class Asked(NamedTuple):
    """All that the rules look at. Where `layout.shard` is still 0, what depends on it is looked at later."""

    layout: Layout
    model: ModelSection
    data: DataSection
    kernels: KernelsSection


class Refusal(NamedTuple):
    """Of a rule: the setting that is to blame, what is wrong, why, and what would work."""

    key: str
    what: str
    why: str
    remedy: str


def check_layout(asked: Asked) -> None:
    """Raises UserError with the first rule that a run breaks: the key, the reason and what would work."""
    for rule in RULES:
        refusal = rule(asked)
        if refusal is not None:
            raise UserError(refusal.what, where=f"layout.{refusal.key}", why=refusal.why, remedy=refusal.remedy)


def micro_batches(asked: Asked) -> list[int]:
    """Micro-batches a step of each size of batch that the run has, fillers included; empty while shard is 0."""
    layout, data = asked.layout, asked.data
    if not layout.shard:
        return []
    sizes = {stage.batch_tokens for stage in data.batch_warmup} | {data.batch_tokens}
    return sorted({-(-(size // data.seq_len) // (layout.data_ways * layout.micro_batch)) for size in sizes})


def divisors(*numbers: int) -> list[int]:
    """All that divide every one of `numbers`."""
    common = gcd(*numbers)
    return [n for n in range(1, common + 1) if common % n == 0]


def _tensor_divides(asked: Asked) -> Refusal | None:
    m, ways = asked.model, asked.layout.tensor
    cut = {"heads": m.heads, "kv_heads": m.kv_heads, "d_ff": m.d_ff, "vocab": m.vocab}
    name = next((name for name, size in cut.items() if size % ways), "")
    if not name:
        return None
    why = {"vocab": "every rank holds equally many rows of it", "d_ff": "every rank holds equally many of its columns"}
    return Refusal(
        "tensor",
        f"tensor={ways} does not divide model.{name}={cut[name]}",
        why.get(name, "a rank must own whole query and key/value heads"),
        f"works with this model: tensor in {divisors(*cut.values())}; layout.shard or layout.pipeline use more ranks",
    )


def _context_divides(asked: Asked) -> Refusal | None:
    ways, length = asked.layout.context, asked.data.seq_len
    if ways == 1 or length % (2 * ways) == 0:
        return None
    return Refusal(
        "context",
        f"context={ways} needs a data.seq_len that {2 * ways} divides, and it is {length}",
        "each rank takes one part from the head and one from the tail of a sequence, so that causal work is even",
        f"works with this length: context in {[n for n in divisors(length) if n == 1 or length % (2 * n) == 0]}",
    )


def _sequence_divides(asked: Asked) -> Refusal | None:
    layout, length = asked.layout, asked.data.seq_len
    part = length // layout.context
    if layout.tensor == 1 or part % layout.tensor == 0:
        return None
    return Refusal(
        "tensor",
        f"tensor={layout.tensor} does not divide the {part} tokens of a sequence that a rank has",
        "between attention and feed-forward layers the ranks of a tensor group share out a sequence's tokens",
        f"works here: tensor in {divisors(part, asked.model.kv_heads, asked.model.d_ff, asked.model.vocab)}, "
        f"or a data.seq_len that {layout.tensor * layout.context * (2 if layout.context > 1 else 1)} divides",
    )


def _tied_on_one_rank(asked: Asked) -> Refusal | None:
    if asked.layout.pipeline == 1 or not asked.model.tied:
        return None
    return Refusal(
        "pipeline",
        f"pipeline={asked.layout.pipeline} cannot be run with model.tied=true",
        "embedding and head would be the same weights on two stages",
        "set model.tied=false, or pipeline=1 and raise layout.shard or layout.tensor",
    )


def _stages_per_rank(asked: Asked) -> Refusal | None:
    layout = asked.layout
    given, wanted = layout.stages_per_rank, STAGES_PER_RANK[layout.schedule]
    many = layout.schedule == "interleaved"
    if layout.pipeline == 1 or not given or (given >= 2 if many else given == wanted):
        return None
    return Refusal(
        "stages_per_rank",
        f"stages_per_rank={given} cannot be run by schedule={layout.schedule!r}",
        f"it has {'at least two stages' if many else ('one stage', 'two stages')[wanted - 1]} on each rank",
        f'leave it out, set it to {"2 or more" if many else wanted}, or take schedule="interleaved" for many',
    )


def _stages_have_layers(asked: Asked) -> Refusal | None:
    layout, layers = asked.layout, asked.model.layers
    if layout.stage_count <= layers:
        return None
    most = layers // (layout.stage_count // layout.pipeline)
    return Refusal(
        "pipeline",
        f"pipeline={layout.pipeline} with schedule={layout.schedule!r} has {layout.stage_count} stages, "
        f"and there are {layers} layers",
        "every stage needs a layer",
        f"at most pipeline={most} with this schedule" if most > 1 else 'take schedule="1f1b", or pipeline=1',
    )


def _stages_are_given_whole(asked: Asked) -> Refusal | None:
    layout, layers = asked.layout, asked.model.layers
    if not layout.stages or layout.pipeline == 1:
        return None
    words = [word.strip() for word in layout.stages.split(",")]
    counts = [int(word) for word in words if word.isascii() and word.isdecimal() and int(word) > 0]
    if len(counts) == len(words) == layout.stage_count and sum(counts) == layers:
        return None
    return Refusal(
        "stages",
        f"stages={layout.stages!r} is no split of {layers} layers into {layout.stage_count} stages",
        "it lists the layers of each stage, at least one, in the order of the stages",
        f"for example {','.join(map(str, even(layers, layout.stage_count)))!r}; empty: balanced by cost",
    )


def _split_backward_keeps_weights(asked: Asked) -> Refusal | None:
    if not asked.layout.splits_backward or asked.layout.reshard != "always":
        return None
    return Refusal(
        "reshard",
        f'reshard="always" cannot be run with schedule={asked.layout.schedule!r}',
        "it takes the gradients of weights in a pass of their own, and finds freed weights there: "
        "they would be wrong without a word",
        'set reshard="never" or "auto", or take schedule="1f1b" or "interleaved"',
    )


def _split_backward_is_eager(asked: Asked) -> Refusal | None:
    if not asked.layout.splits_backward or not asked.kernels.compile:
        return None
    return Refusal(
        "schedule",
        f"schedule={asked.layout.schedule!r} cannot be run with kernels.compile=true",
        "a compiled block takes both gradients in one pass; split in two they have come out wrong without a word",
        'set kernels.compile=false, or take schedule="1f1b" or "interleaved"',
    )


def _enough_micro_batches(asked: Asked) -> Refusal | None:
    layout = asked.layout
    if layout.pipeline == 1:
        return None
    for count in micro_batches(asked):
        wanted = micro_batches_refused(layout, count)
        if wanted:
            return Refusal(
                "schedule",
                f"schedule={layout.schedule!r} cannot run the {count} micro-batches that a rank has in a step",
                f"it needs {wanted}",
                "change data.batch_tokens (and data.batch_warmup), layout.micro_batch, or the number of data ranks; "
                'schedule="gpipe" runs any number',
            )
    return None


def micro_batches_refused(layout: Layout, count: int) -> str:
    """What a schedule needs in a step where `count` micro-batches will not do; empty where they will."""
    if layout.schedule == "1f1b" and count < layout.stage_count:
        return f"at least as many as there are stages, {layout.stage_count}"
    if layout.schedule == "dualpipev" and count < layout.stage_count:
        return f"at least as many as there are stages, {layout.stage_count}"
    if layout.schedule == "interleaved" and count % max(1, count // layout.pipeline):
        return f"a multiple of the rounds they are taken in ({max(1, count // layout.pipeline)})"
    return ""


def _deepspeed_cuts_data(asked: Asked) -> Refusal | None:
    layout = asked.layout
    axis = next((axis for axis in AXES if axis != "shard" and getattr(layout, axis) > 1), "")
    if layout.engine != "deepspeed" or not axis:
        return None
    return Refusal(
        axis,
        f"{axis}={getattr(layout, axis)} cannot be run by DeepSpeed",
        "ZeRO cuts over all ranks: it has no copies beside it, and does not take weights that are cut already",
        f'set layout.{axis}=1 and raise layout.shard, or set layout.engine="fsdp"',
    )


def _fsdp_offloads_all(asked: Asked) -> Refusal | None:
    if asked.layout.engine == "deepspeed" or asked.layout.offload != "optimizer":
        return None
    return Refusal(
        "offload",
        'offload="optimizer" is DeepSpeed\'s',
        "FSDP moves weights, gradients and moments to the host's memory together",
        'set layout.offload="all", or layout.engine="deepspeed"',
    )


def _offloaded_weights_are_cut(asked: Asked) -> Refusal | None:
    layout = asked.layout
    if layout.engine != "deepspeed" or layout.offload != "all" or layout.zero_stage == 3:
        return None
    return Refusal(
        "offload",
        f'offload="all" needs ZeRO stage 3, and zero_stage is {asked.layout.zero_stage}',
        "stages 1 and 2 keep the weights whole on the device",
        'set layout.zero_stage=3, or layout.offload="optimizer"',
    )


def _deepspeed_precision(asked: Asked) -> Refusal | None:
    if asked.layout.engine != "deepspeed" or asked.layout.precision != "fp64":
        return None
    return Refusal(
        "precision",
        'precision="fp64" cannot be run by DeepSpeed',
        "its partitions of weights and moments are fp32",
        'set layout.precision="fp32", or layout.engine="fsdp"',
    )


def _deepspeed_reshards_by_stage(asked: Asked) -> Refusal | None:
    if asked.layout.engine != "deepspeed" or asked.layout.reshard == "auto":
        return None
    return Refusal(
        "reshard",
        f"reshard={asked.layout.reshard!r} is not DeepSpeed's",
        "whether gathered weights are freed follows from the stage: 3 frees them, 1 and 2 keep them whole",
        'set layout.reshard="auto" and layout.zero_stage, or layout.engine="fsdp"',
    )


def _deepspeed_reduces_by_stage(asked: Asked) -> Refusal | None:
    if asked.layout.engine != "deepspeed" or asked.layout.reduce == "step":
        return None
    return Refusal(
        "reduce",
        'reduce="micro_batch" is not DeepSpeed\'s',
        "when gradients are summed follows from the stage: 1 does so once a step, 2 and 3 after each micro-batch",
        'set layout.reduce="step" and layout.zero_stage, or layout.engine="fsdp"',
    )


def _pipeline_reduces_once(asked: Asked) -> Refusal | None:
    if asked.layout.pipeline == 1 or asked.layout.reduce == "step":
        return None
    return Refusal(
        "reduce",
        f'reduce="micro_batch" cannot be run with pipeline={asked.layout.pipeline}',
        "a schedule sums a stage's gradients when its last micro-batch is done",
        'set layout.reduce="step": more stages have fewer gradients each; or pipeline=1',
    )


def _deepspeed_gathers_in_hooks(asked: Asked) -> Refusal | None:
    if asked.layout.engine != "deepspeed" or asked.layout.zero_stage < 3 or not asked.kernels.compile:
        return None
    return Refusal(
        "zero_stage",
        "zero_stage=3 cannot be run with kernels.compile=true",
        "DeepSpeed gathers and frees weights in hooks within a block, which a full graph cannot hold",
        'set kernels.compile=false, layout.zero_stage=2, or layout.engine="fsdp"',
    )


RULES: tuple[Callable[[Asked], Refusal | None], ...] = (
    _tensor_divides,
    _context_divides,
    _sequence_divides,
    _tied_on_one_rank,
    _stages_per_rank,
    _stages_have_layers,
    _stages_are_given_whole,
    _split_backward_keeps_weights,
    _split_backward_is_eager,
    _enough_micro_batches,
    _deepspeed_cuts_data,
    _fsdp_offloads_all,
    _offloaded_weights_are_cut,
    _deepspeed_precision,
    _deepspeed_reshards_by_stage,
    _deepspeed_reduces_by_stage,
    _pipeline_reduces_once,
    _deepspeed_gathers_in_hooks,
)


def even(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as equal as can be, the first ones larger."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def counted(number: int, what: str) -> str:
    """ "1 rank", "1,024 ranks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _few(numbers: list[int]) -> str:
    """A list that people can read, however long it is."""
    words = [f"{number:,}" for number in numbers]
    return ", ".join(words if len(words) <= 12 else [*words[:8], "...", *words[-3:]])


def _product(layout: Layout) -> str:
    return _joined(f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1)


def _joined(words: Iterable[str]) -> str:
    return " x ".join(words) or "1"
