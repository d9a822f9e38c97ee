"""All legal layouts of a run on a number of ranks, each with bounds that no exact prediction is below.

A layout is a tuple of numbers until it is worth more: a large run has hundreds of thousands.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from minka.plan.cluster import Cluster
from minka.plan.collective_time import Group, passes_seconds
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import compute_dtype_name
from minka.plan.layout import V_SHAPED, Layout, divisors
from minka.plan.layout_rules import Asked, check_layout
from minka.plan.memory_block import BlockMemory
from minka.plan.pipeline_passes import ACTIVE_STAGES
from minka.plan.pipeline_stages import stages_of
from minka.plan.run_job import job_of
from minka.plan.step_time import part_seconds
from minka.plan.step_work import block_weights

LEAST_TOKENS = 256  # of a sequence on a context rank: shorter parts are all latency
MOST_STAGES = 8  # a rank, of an interleaved schedule
MOST_SEQUENCES = 64  # of a micro-batch
RECOMPUTE = ("none", "selective", "block")
NOTHING: Mapping[str, Any] = {}


class Cut(NamedTuple):
    """The axes of a layout."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int


class Way(NamedTuple):
    """How a cut is run."""

    schedule: str
    stages_per_rank: int
    micro_batch: int
    recompute: str
    reshard: str
    reduce: str


class Candidate(NamedTuple):
    """A legal layout. `seconds` is at most what its step takes."""

    seconds: float
    cut: Cut
    way: Way

    def layout(self, base: Layout) -> Layout:
        """Return it as a layout, with what `base` says on all else."""
        return base.model_copy(update={**self.cut._asdict(), **self.way._asdict(), "stages": ""})


class Coordinate(NamedTuple):
    """What a pipeline coordinate holds at least, in blocks and in hidden states of a micro-batch."""

    blocks: int
    passed: int  # times a block has run forward, and not backward, at once
    received: int  # of their inputs, those that are in a buffer for what was received
    buffers: int  # for every micro-batch's hidden states and their gradients, during the whole step
    steady: bool  # whether it still keeps as much once gradients are added up


class Candidates:
    """Goes through all of them. `searched` counts them, `pruned` those that are not worth a prediction, by reason."""

    def __init__(
        self, config: RunConfig, world: int, cluster: Cluster, room: float, pinned: Mapping[str, Any] = NOTHING
    ) -> None:
        self.config, self.world, self.cluster, self.room, self.pinned = config, world, cluster, room, pinned
        self.sequences = config.data.batch_tokens // config.data.seq_len
        self.searched, self.pruned = 0, Counter[str]()
        self.padded = False  # whether most of a step may be padding
        self._bounds = cache(self._part_bounds)
        self._verdict = cache(self._refusal)
        self._transfers = cache(self._group_transfers)
        self._coordinates = cache(self._coordinate_layers)
        stored, precision = config.optimizer, compute_dtype_name(config.layout, "cuda")
        bf16 = precision != "fp64"
        weights, moments = (2 if bf16 and one == "bf16" else 4 for one in (stored.weights, stored.moments))
        self.state_bytes = weights + 2 * moments  # of a weight

    def __iter__(self) -> Iterator[Candidate]:
        yield from self._all()
        if not self.searched:
            self.padded = True
            yield from self._all()

    def _all(self) -> Iterator[Candidate]:
        model, world, data = self.config.model, self.world, self.config.data
        tensors = divisors(model.heads, model.kv_heads, model.d_ff, model.vocab, world)
        for tensor in self._asked("tensor", [t for t in tensors if self.cluster.tensor_domain % t == 0]):
            for context in self._asked("context", divisors(world // tensor)):
                if context > 1 and (data.seq_len % (2 * context) or data.seq_len // context < LEAST_TOKENS):
                    continue
                for pipeline in self._asked("pipeline", divisors(world // tensor // context)):
                    ways = world // tensor // context // pipeline
                    if pipeline <= model.layers and self._worth_it(ways, 1):
                        both = [(one, ways // one) for one in divisors(ways)]
                        for replicate in [one for one, shard in both if self._allowed(replicate=one, shard=shard)]:
                            yield from self._of_cut(Cut(pipeline, replicate, ways // replicate, context, tensor))

    def _worth_it(self, ways: int, micro_batch: int) -> bool:
        """Whether ranks have no more padding than they must; any step where no other layout is legal."""
        at_once = ways * micro_batch
        uneven = self.sequences % ways != 0 and at_once < 2 * self.sequences
        return at_once <= self.sequences or uneven or (self.padded and micro_batch == 1)

    def _of_cut(self, cut: Cut) -> Iterator[Candidate]:
        layers, ways = self.config.model.layers, cut.replicate * cut.shard
        sizes = [2**power for power in range(MOST_SEQUENCES.bit_length())]
        if "micro_batch" in self.pinned:
            sizes = [self.pinned["micro_batch"]]
        for micro_batch in sizes:
            if not self._worth_it(ways, micro_batch):
                break
            for schedule, stages in _schedules(cut.pipeline, layers):
                if not self._allowed(schedule=schedule, stages_per_rank=stages):
                    continue
                for reduce in self._asked("reduce", ("step", "micro_batch")):
                    refused = self._verdict(
                        cut._replace(replicate=1, shard=ways), schedule, stages, micro_batch, reduce
                    )
                    if refused:
                        self.pruned[refused] += len(RECOMPUTE)
                        continue
                    for recompute in self._asked("recompute", RECOMPUTE):
                        way = Way(schedule, stages, micro_batch, recompute, "never", reduce)
                        yield from self._bounded(cut, way)

    def _allowed(self, **settings: Any) -> bool:
        return all(self.pinned.get(key, value) == value for key, value in settings.items())

    def _asked(self, key: str, choices: Sequence[Any]) -> list[Any]:
        return [one for one in choices if self._allowed(**{key: one})]

    def _bounded(self, cut: Cut, way: Way) -> Iterator[Candidate]:
        """The candidates that may fit, with what their step takes at least."""
        ways = cut.replicate * cut.shard
        m = -(-self.sequences // (ways * way.micro_batch))
        block, saved, hidden, weights = self._bounds(cut.tensor, cut.context, way.micro_batch, way.recompute)
        layers = self.config.model.layers / cut.pipeline
        held, fsdp = layers * weights, cut.shard * cut.context
        state = self.state_bytes / fsdp  # of a weight of a rank's blocks
        added_up = 4 if m > 1 and way.reduce == "step" and fsdp > 1 else 0  # gradients, whole, in fp32
        coordinates = self._coordinates(cut.pipeline, way.schedule, way.stages_per_rank, m)
        freed = fsdp > 1 and way.schedule not in V_SHAPED
        active = min(1.0, ACTIVE_STAGES / (way.stages_per_rank or 1))  # of its stages a rank has gathered at once
        for reshard in self._asked("reshard", ("never", "always") if freed else ("never",)):
            self.searched += 1
            each = weights * (state + (2 * active if reshard == "never" and fsdp > 1 else 0))
            # Before the first backward pass nothing is added up; in the last one few activations are left.
            if any(
                blocks * each
                + buffers * hidden
                + max(passed * saved - received * hidden + blocks * added_up * steady, blocks * added_up)
                > self.room
                for blocks, passed, received, buffers, steady in coordinates
            ):
                self.pruned["memory"] += 1
                continue
            rounds = float(m)
            if cut.pipeline > 1 and way.schedule not in V_SHAPED:
                rounds += (cut.pipeline - 1) / (way.stages_per_rank or 1)
            seconds = layers * (block[0] + block[1]) * rounds
            times = (m if reshard == "always" else 1), (m if way.reduce == "micro_batch" else 1)
            seconds += self._waits(cut, held, times, (layers * block[0], layers * block[1]))
            yield Candidate(seconds, cut, way._replace(reshard=reshard))

    def _coordinate_layers(self, pipeline: int, schedule: str, stages: int, m: int) -> set[Coordinate]:
        """What each pipeline coordinate holds at least; those that others have all of are left out."""
        way = {"pipeline": pipeline, "schedule": schedule, "stages_per_rank": stages, "stages": ""}
        layout = self.config.layout.model_copy(update=way)
        layers, found = [len(stage) for stage in stages_of(layout, self.config.model)], set[Coordinate]()
        for rank in range(pipeline):
            held = layout.stages_of_rank(rank)
            least, inputs, outputs = min(layers[one] for one in held), len(held), len(held)
            inputs -= 0 in held
            outputs -= layout.stage_count - 1 in held
            ahead = len(held) * (m if schedule == "gpipe" else min(m, pipeline - rank))
            if schedule == "interleaved":  # plan/pipeline_passes.py
                at_once = m // max(1, m // pipeline)
                ahead = min((len(held) - 1) * at_once + 2 * (pipeline - 1 - rank) + 1, len(held) * m)
            steady = ahead < m if len(held) == 1 else m >= 3 * pipeline
            received = ahead if inputs == len(held) else ahead * (len(held) > 1)
            blocks = sum(layers[one] for one in held)
            found.add(Coordinate(blocks, least * ahead, received, (inputs + outputs) * m, steady))
        return found if len(found) < 3 else {one for one in found if not any(_all_less(one, two) for two in found)}

    def _waits(self, cut: Cut, held: float, times: tuple[int, int], behind: tuple[float, float]) -> float:
        """Seconds that a step waits for FSDP at least: gathered so often for forward and backward, reduced so often."""
        if cut.shard * cut.context == 1:
            return 0.0
        gather, reduce = self._transfers(cut.shard * cut.context, cut.tensor, held)
        exposed = self.cluster.rates.exposed

        def waited(seconds: float, hidden: float) -> float:
            return max(0.0, seconds - hidden) + exposed * min(seconds, hidden)

        found = times[0] * waited(gather, behind[0]) + times[1] * waited(reduce, behind[1])
        return found + (times[0] * waited(gather, behind[1]) if times[0] > 1 else 0.0)

    def _group_transfers(self, ranks: int, stride: int, held: float) -> tuple[float, float]:
        """Seconds to gather a rank's weights, and to reduce their gradients."""
        group = Group(ranks, stride)
        crowd = self.cluster.crowded(self.world)
        gather, reduce = (crowd * passes_seconds(self.cluster, group, held * size, 1) for size in (2, 4))
        return gather, reduce

    def _part_bounds(
        self, tensor: int, context: int, micro_batch: int, recompute: str
    ) -> tuple[tuple[float, float], int, int, float]:
        """Return a block's seconds forward and backward, bytes it keeps and those of its input, and its weights."""
        axes = {"tensor": tensor, "context": context, "micro_batch": micro_batch, "recompute": recompute}
        layout = self.config.layout.model_copy(update={**axes, "shard": 1, "replicate": 1, "pipeline": 1})
        part = job_of(self.config, layout, self.cluster).part
        times = part_seconds(part, self.cluster, self.cluster.crowded(self.world))
        block = BlockMemory(self.config, layout, self.cluster.device_kind)
        seconds = times.forward.total, times.backward.total
        return seconds, block.saved() + block.kept_rows(), block.hidden, block_weights(part)

    def _refusal(self, cut: Cut, schedule: str, stages: int, micro_batch: int, reduce: str) -> str:
        """Why a layout is not legal; empty where it is. FSDP against replicas plays no part."""
        way = Way(schedule, stages, micro_batch, "none", "never", reduce)
        layout = Candidate(0.0, cut, way).layout(self.config.layout)
        asked = Asked(layout, self.config.model, self.config.data, self.config.kernels, self.config.optimizer)
        try:
            check_layout(asked)
        except UserError as error:
            return f"not legal: {error.where}"
        return ""


def _all_less(one: Coordinate, other: Coordinate) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


@cache
def _schedules(pipeline: int, layers: int) -> list[tuple[str, int]]:
    if pipeline == 1:
        return [("1f1b", 0)]
    many = [("interleaved", v) for v in range(2, MOST_STAGES + 1) if v * pipeline <= layers]
    both = [("zbv", 0), ("dualpipev", 0)] if 2 * pipeline <= layers else []
    return [("1f1b", 0), ("gpipe", 0), *many, *both]
