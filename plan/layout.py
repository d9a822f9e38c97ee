"""Layout: how one run is cut over ranks. layout_rules.py says which layouts cannot be run."""

from math import gcd, isqrt
from typing import Literal

from pydantic import BaseModel, Field

from minka.plan.config_sections import DataSection
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
    tensor_across_domains: bool = Field(False, description="let a tensor group cross NVLink domains, over slower links")
    micro_batch: int = Field(1, ge=1, description="sequences a rank takes through the model at once")
    schedule: Schedule = Field("1f1b", description="order of a pipeline's passes")
    stages_per_rank: int = Field(0, ge=0, description="pipeline stages a rank holds; 0 = what the schedule wants")
    stages: str = Field("", description='layers of each stage, "3,4,4,3"; empty: balanced by cost')
    recompute: Literal["none", "selective", "block"] = Field("none", description="what backward computes again")
    reshard: Literal["auto", "always", "never"] = Field("auto", description="free gathered weights after forward")
    reduce: Literal["step", "micro_batch"] = Field("step", description="sum gradients over shard: once, or each time")
    # Weights stay fp32; fp64, which tells a fault from rounding, is for weights too.
    precision: Literal["auto", "fp32", "bf16", "fp64"] = Field("auto", description="compute dtype")
    engine: Literal["fsdp", "deepspeed"] = Field("fsdp", description="what shards weights and updates them")
    zero_stage: Literal[1, 2, 3] = Field(3, description="deepspeed: cut moments (1), gradients (2), weights (3)")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="what is kept in host memory")

    @property
    def world(self) -> int:
        """Number of ranks; only for a resolved layout (shard > 0)."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data_ways(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def stage_count(self) -> int:
        """Stages of the whole pipeline; 1 without one."""
        return 1 if self.pipeline == 1 else self.pipeline * (self.stages_per_rank or STAGES_PER_RANK[self.schedule])

    @property
    def splits_backward(self) -> bool:
        """Whether backward computes gradients of inputs and of weights in two passes."""
        return self.pipeline > 1 and self.schedule in V_SHAPED

    def rank_of_stage(self, stage: int) -> int:
        """Return the pipeline coordinate of the ranks that hold a stage."""
        if self.splits_backward:
            return min(stage, 2 * self.pipeline - 1 - stage)
        return stage % self.pipeline

    def stages_of_rank(self, coordinate: int) -> list[int]:
        """Return the stages held at a pipeline coordinate, in the order they run."""
        if self.splits_backward:
            return [coordinate, 2 * self.pipeline - 1 - coordinate]
        return list(range(coordinate, self.stage_count, self.pipeline))

    def resolve(self, ranks: int) -> "Layout":
        """Return the layout on `ranks` ranks, with shard filled in. Raises UserError where the numbers do not fit."""
        ways = self.pipeline * self.replicate * self.context * self.tensor
        layout = self.model_copy(update={"shard": self.shard or max(1, ranks // ways)})
        if layout.world == ranks:
            return layout
        works, needs = [layout.world], counted(layout.world, "rank")
        if not self.shard:
            works, needs = [ranks // ways * ways, -(-ranks // ways) * ways], f"a multiple of {counted(ways, 'rank')}"
        products = [f"{number:,}" for number in divisors(ranks)]
        if len(products) > 12:
            products = [*products[:8], "...", *products[-3:]]
        raise UserError(
            f"the layout ({self.describe()}) needs {needs}, not {ranks:,}",
            where="layout",
            why="every rank has exactly one position on the mesh",
            remedy=f"works: {' or '.join(f'{n:,}' for n in works if n)} ranks; or layout.shard=0 (all ranks left) with "
            f"axes whose product divides {ranks:,}: {', '.join(products)}",
        )

    def describe(self) -> str:
        """Return the axes that are cut, "pipeline 2 x tensor 4", or "one rank"."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one rank"


def micro_batches(layout: Layout, data: DataSection) -> list[int]:
    """Return how many micro-batches a step has, padding included, for each size of batch; none while shard is 0."""
    sizes = {stage.batch_tokens for stage in data.batch_warmup} | {data.batch_tokens}
    at_once = layout.data_ways * layout.micro_batch
    return sorted({-(-(size // data.seq_len) // at_once) for size in sizes}) if at_once else []


def micro_batches_fit(layout: Layout, count: int) -> bool:
    """Return whether a pipeline's schedule can run a step of `count` micro-batches."""
    if layout.schedule in ("1f1b", "dualpipev"):
        return count >= layout.stage_count
    if layout.schedule == "interleaved":  # taken in equal rounds
        return count % max(1, count // layout.pipeline) == 0
    return True


def divisors(*numbers: int) -> list[int]:
    """Return the common divisors of `numbers`, in rising order."""
    common = gcd(*numbers)
    small = [n for n in range(1, isqrt(common) + 1) if common % n == 0]
    return sorted({*small, *(common // n for n in small)})


def counted(number: int, what: str) -> str:
    """Return "1 rank" or "1,024 ranks"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
