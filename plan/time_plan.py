"""`minka plan time`: how long a step and a run take on a cluster, what they cost, and what that rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.batch_padding import describe_padding
from minka.plan.cluster import Cluster, find_cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.execution_choices import compute_dtype_name
from minka.plan.flops import FORMULAS, training_flops_per_token
from minka.plan.hardware import find_gpu
from minka.plan.layout import Layout, micro_batches
from minka.plan.layout_search import MARGIN
from minka.plan.load_config import load_run
from minka.plan.memory import predict_memory
from minka.plan.rates import read_rates
from minka.plan.run_job import job_of, on_cluster
from minka.plan.step_time import KINDS, part_seconds, step_time
from minka.plan.step_work import StepJob, block_weights, end_weights

DAY = 86_400
HOST_BYTES = 20e9  # a second, from a GPU's memory to its host's: PCIe 4 x16, as measured by most


class RunTime(NamedTuple):
    """Seconds of a run."""

    steps: int
    training: float
    saves: float
    evaluations: float

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        return self.training + self.saves + self.evaluations


def cluster_for(gpu: str, rates: Path | None = None) -> Cluster:
    """Return a cluster by name or file, with the rates of a calibration file. Raises UserError."""
    cluster = find_cluster(gpu)
    return replace(cluster, rates=read_rates(rates)) if rates else cluster


def time_plan(config: RunConfig, world: int, cluster: Cluster, dollars_per_hour: float | None = None) -> dict[str, Any]:
    """Return what the JSON has. Raises UserError for a layout that is not legal on `world` ranks."""
    layout = config.after_warmup().check(world)
    check_peak(config, cluster)
    job = job_of(config.after_warmup(), layout, cluster)
    step = step_time(job, cluster)
    run = run_time(config, layout, cluster)
    per_second = config.data.batch_tokens / step.seconds
    peak = cluster.peak_flops * world
    flops = {name: training_flops_per_token(config.model, config.data.seq_len, name) for name in FORMULAS}
    hours = run.total / 3600 * world
    return {
        "world": world,
        "gpu": cluster.name,
        "layout": layout.model_dump(mode="json"),
        "micro_batches": job.micro_batches,
        "step_seconds": step.seconds,
        "breakdown_seconds": step.breakdown,
        "tokens_per_second_per_gpu": per_second / world,
        "mfu": {name: per_second * count / peak for name, count in flops.items()},
        "steps": run.steps,
        "save_seconds": run.saves,
        "evaluation_seconds": run.evaluations,
        "days": run.total / DAY,
        "gpu_hours": hours,
        "dollars": None if dollars_per_hour is None else hours * dollars_per_hour,
        "padding": describe_padding(config.after_warmup(), layout),
        "warmup_refused": config.warmup_refused(world),
        "not_counted": not_counted(config),
        "calibrated": cluster.rates.described(),
    }


def _memory(config: RunConfig, world: int, cluster: Cluster) -> dict[str, Any]:
    """The largest peak of a rank, null where it is not predicted, and why that does not fit."""
    try:
        most = max(rank.total for rank in predict_memory(config, world, cluster.device_kind))
    except UserError:
        return {"peak_bytes": None, "does_not_fit": ""}
    sizes = f"{most / 2**30:.1f} GiB at the peak of a rank, of {cluster.memory_bytes / 2**30:.1f} GiB"
    why = f"{sizes} less {MARGIN:.0%} for CUDA and NCCL; `minka plan layout` finds what fits"
    return {"peak_bytes": most, "does_not_fit": "" if most <= (1 - MARGIN) * cluster.memory_bytes else why}


def check_peak(config: RunConfig, cluster: Cluster) -> None:
    """Raises UserError where the peak that is known is not that of the run's dtype."""
    precision, known = compute_dtype_name(config.layout, cluster.device_kind), find_gpu(cluster.name)
    if precision != "bf16" and known is not None and known.peak_flops == cluster.peak_flops:
        what = f"time under layout.precision={precision!r} is not predicted: the peak of {cluster.name} is that of bf16"
        remedy = "describe it with its peak in that dtype: --gpu machine.toml (docs/plan.md)"
        raise UserError(what, where="layout.precision", remedy=remedy)


def not_counted(config: RunConfig) -> list[str]:
    """Return what a run's days leave out."""
    found = ["reading and preparing data", "starts, failures and what is trained again after them"]
    if not config.eval.max_documents:
        found.append("evaluations: eval.max_documents=0 is all documents, and how many that is depends on the corpus")
    return found


def run_time(config: RunConfig, layout: Layout, cluster: Cluster) -> RunTime:
    """Return how long all steps of a run take, its batch warm-up, saves and evaluations included."""
    whole = job_of(config.after_warmup(), layout, cluster)
    seconds, begun, consumed = 0.0, 0, 0
    steps, tokens = config.end()
    ends = [(stage.until_tokens, stage.batch_tokens) for stage in config.data.batch_warmup]
    for until, batch in (*ends, (tokens, config.data.batch_tokens)):
        count = min(steps - begun, max(0, -(-(min(until, tokens) - consumed) // batch)))
        one = config.data.model_copy(update={"batch_tokens": batch, "batch_warmup": ()})
        job = replace(whole, micro_batches=max(micro_batches(layout, one)))
        seconds += count * step_time(job, cluster).seconds
        begun, consumed = begun + count, consumed + count * batch
    return RunTime(steps, seconds, _saves(config, whole, steps), _evaluations(config, whole, cluster, steps, tokens))


def _saves(config: RunConfig, job: StepJob, steps: int) -> float:
    """Seconds for which training waits: until its state is in the host's memory."""
    saves = 1 + (steps // config.checkpoint.every_steps if config.checkpoint.every_steps else 0)
    saves += len(config.checkpoint.keep_tokens)
    layout = job.layout
    held = sum(job.stage_layers) / layout.pipeline * block_weights(job.part) + end_weights(job.part)
    return saves * held / (layout.shard * layout.context) * 12 / HOST_BYTES


def _evaluations(config: RunConfig, job: StepJob, cluster: Cluster, steps: int, tokens: int) -> float:
    """Seconds of the evaluations, each of `eval.max_documents` documents of a sequence; 0 where that is all of them."""
    counts = [1]  # at the end
    counts += [steps // config.eval.every_steps] if config.eval.every_steps else []
    counts += [tokens // config.eval.every_tokens] if config.eval.every_tokens else []
    documents = config.eval.max_documents
    ways = job.layout.data_ways * job.layout.micro_batch
    times = part_seconds(job.part, cluster, cluster.crowded(job.layout.world))
    whole = times.forward.total * job.part.shape.layers + times.head.total / 3
    at_once = -(-documents // ways)  # batches, which follow each other through a pipeline
    return sum(counts) * whole * (at_once + job.layout.pipeline - 1) / job.layout.pipeline * (documents > 0)


def time_of_run(
    run: str, overrides: Sequence[str], world: int, gpu: str, rates: Path | None, price: float | None
) -> dict[str, Any]:
    """Return the plan of a recipe, file or run. Raises UserError."""
    if price is not None and not 0 <= price < inf:
        raise UserError(
            f"a price of {price}", where="--price-per-gpu-hour", remedy="give dollars a GPU-hour, such as 2.5"
        )
    config, cluster = load_run(run, overrides).config, cluster_for(gpu, rates)
    return time_plan(config, world, cluster, price) | _memory(on_cluster(config, cluster), world, cluster)


def time_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of a table for people."""
    step = found["step_seconds"]
    names = {"memory": "norms, activations, logits", "launch": "launches that are not hidden"}
    names |= {"matrix": "matrix products", "bubble": "waiting for the pipeline", "optimizer": "update"}
    axes = ("tensor", "context", "shard", "replicate", "pipeline")
    names |= {axis: f"waiting for {axis} collectives" for axis in axes}
    rows = [["a step", f"{step:.3g} s", f"{found['micro_batches']:,} micro-batches; {found['calibrated']}"]]
    for kind in KINDS:
        seconds = found["breakdown_seconds"][kind]
        if seconds > 0.0005 * step:
            rows.append([f"  {names.get(kind, kind)}", f"{seconds:.3g} s", f"{seconds / step:.1%}"])
    rows.append(["tokens a second and GPU", f"{found['tokens_per_second_per_gpu']:,.0f}", found["gpu"]])
    rows += [[f"MFU, {name}", f"{value:.1%}", FORMULAS[name]] for name, value in found["mfu"].items()]
    rows.append(["the run", duration(found["days"]), f"{found['steps']:,} steps"])
    for key, name in (("save_seconds", "saves"), ("evaluation_seconds", "evaluations")):
        share = found[key] / (found["days"] * DAY)
        rows.append([f"  {name}", duration(found[key] / DAY), f"{share:.1%}"])
    cost = "" if found["dollars"] is None else f"${found['dollars']:,.0f}"
    if found["does_not_fit"]:
        rows.insert(0, ["does not fit", "", found["does_not_fit"]])
    if found["padding"]:
        rows.insert(1, ["padding", "", found["padding"].removeprefix("note: ")])
    rows += [["  not counted", "", what] for what in found["not_counted"]]
    if found["warmup_refused"]:
        rows.append(["not legal at first", "", f"during the batch warm-up: {found['warmup_refused']}"])
    rows.append(["GPU-hours", f"{found['gpu_hours']:,.0f}", cost or "--price-per-gpu-hour DOLLARS: what it costs"])
    return rows


def duration(days: float) -> str:
    """Return days, or a unit that makes it 1 or more."""
    for unit, size in (("days", 1.0), ("h", 24), ("min", 1440)):
        if days * size >= 1:
            return f"{days * size:,.1f} {unit}"
    return f"{days * DAY:.1f} s"
