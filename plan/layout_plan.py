"""`minka plan layout`: the fastest layouts that fit, why the first one wins, and the benchmark that would decide."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from shlex import join
from typing import Any

from minka.plan.cluster import Cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.flops import training_flops_per_token
from minka.plan.layout import AXES, Layout
from minka.plan.layout_search import MARGIN, Found, search
from minka.plan.load_config import load_run
from minka.plan.memory import peak_or_more
from minka.plan.run_job import job_of, on_cluster
from minka.plan.step_time import KINDS, step_time
from minka.plan.time_plan import check_peak, cluster_for

KEYS = ("micro_batch", "schedule", "stages_per_rank", "recompute", "reshard", "reduce")  # next to AXES
MOST_COMPARED = 3
CLOSE = 0.05  # of the winner's time: a short benchmark decides between these
BENCHMARK = ["run.max_steps=20", "schedule.unit=steps", "schedule.warmup=0", "schedule.decay=0", "data.batch_warmup=[]"]
BENCHMARK += ["tracking.log_every=4", "checkpoint.every_steps=0"]
BENCHMARK += ["checkpoint.export=false", "eval.every_steps=0", "eval.max_documents=1"]


def layout_plan(
    run: str, overrides: Sequence[str], world: int, gpu: str, rates: Path | None = None, top: int = 5
) -> dict[str, Any]:
    """Return what the JSON has. Raises UserError where nothing fits."""
    cluster = cluster_for(gpu, rates)
    config = on_cluster(load_run(run, overrides).config, cluster)
    check_peak(config, cluster)
    pinned = pinned_by(overrides, config.layout)
    peak = partial(peak_or_more, device_kind=cluster.device_kind)
    found = search(config, world, cluster, top, peak, pinned)
    best = found.found[0]
    layouts = [_as_dict(config, one, cluster) for one in found.found]
    close = [one for one in found.found if one.time.seconds <= best.time.seconds * (1 + CLOSE)][:MOST_COMPARED]
    settings = [overrides_of(one.layout, config.layout) for one in close]
    return {
        "world": world,
        "gpu": cluster.name,
        "layouts": layouts,
        "pinned": pinned,
        "searched": found.searched,
        "pruned": found.pruned,
        "why": _why(found.found),
        "neighbours": neighbours(config.after_warmup(), best, cluster),
        "benchmark": [_command(run, overrides, *one) for one in enumerate(settings, 1)] if len(close) > 1 else [],
        "calibrated": cluster.rates.described(),
    }


def pinned_by(overrides: Sequence[str], layout: Layout) -> dict[str, Any]:
    """Return the settings that the overrides decide: of them only layouts that have these are searched."""
    given = [word.partition("=")[0].removeprefix("layout.") for word in overrides if word.startswith("layout.")]
    automatic = {"shard": 0, "reshard": "auto", "stages_per_rank": 0}
    asked = {key: getattr(layout, key) for key in given if key in (*AXES, *KEYS)}
    return {key: value for key, value in asked.items() if automatic.get(key) != value}


def _as_dict(config: RunConfig, one: Found, cluster: Cluster) -> dict[str, Any]:
    per_second = config.data.batch_tokens / one.time.seconds
    flops = training_flops_per_token(config.model, config.data.seq_len)
    return {
        "layout": one.layout.model_dump(mode="json"),
        "overrides": overrides_of(one.layout, config.layout),
        "step_seconds": one.time.seconds,
        "breakdown_seconds": one.time.breakdown,
        "peak_bytes": one.peak_bytes,
        "warmup_refused": config.model_copy(update={"layout": one.layout}).warmup_refused(one.layout.world),
        "mfu": per_second * flops / (cluster.peak_flops * one.layout.world),
    }


def overrides_of(layout: Layout, run: Layout) -> list[str]:
    """Return the layout as overrides of a run, without what the run has itself."""
    keys = [key for key in (*AXES, *KEYS, "stages") if getattr(layout, key) != getattr(run, key)]
    return [f"layout.{key}={getattr(layout, key)}" for key in keys]


def _why(found: Sequence[Found]) -> str:
    """Return what the first layout saves against the second, and what it pays for that."""
    if len(found) < 2:
        return "it is the only one that was asked for, or that fits"
    best, other = found[0].time, found[1].time
    gains = {kind: other.breakdown[kind] - best.breakdown[kind] for kind in KINDS}
    threshold = 0.001 * best.seconds
    saves = [
        f"{gains[kind]:.3g} s of {kind}" for kind in sorted(KINDS, key=lambda k: -gains[k]) if gains[kind] > threshold
    ]
    pays = [
        f"{-gains[kind]:.3g} s of {kind}" for kind in sorted(KINDS, key=gains.__getitem__) if -gains[kind] > threshold
    ]
    return f"against the second: saves {_listed(saves)}, pays {_listed(pays)}"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:3]) or "nothing"


def neighbours(config: RunConfig, best: Found, cluster: Cluster) -> list[dict[str, Any]]:
    """Return what each single change of the best layout would cost: its time and memory, or why it is not legal."""
    world, rows = best.layout.world, []
    for change in _changes(best.layout):
        layout = best.layout.model_copy(update={**change, "shard": 0, "stages": ""})
        if best.layout.shard == 1 and "replicate" not in change:  # else shards make up for the change
            ways = world // (layout.pipeline * layout.context * layout.tensor)
            layout = layout.model_copy(update={"shard": 1, "replicate": max(1, ways)})
        if layout.pipeline > 1 and "reduce" not in change:
            layout = layout.model_copy(update={"reduce": "step"})
        row: dict[str, Any] = {
            "change": change,
            "step_seconds": None,
            "peak_bytes": None,
            "fits": None,
            "refused": None,
        }
        try:
            there = config.model_copy(update={"layout": layout})
            layout = there.check(world)
            row["step_seconds"] = step_time(job_of(there, layout, cluster), cluster).seconds
            row["peak_bytes"] = peak_or_more(there, world, inf, cluster.device_kind)
            row["fits"] = row["peak_bytes"] <= (1 - MARGIN) * cluster.memory_bytes
        except UserError as error:
            row["refused"] = ". ".join(filter(None, [error.what, error.why]))
        rows.append(row)
    return rows


def _changes(layout: Layout) -> list[dict[str, Any]]:
    """Return changes of one setting: an axis doubled or halved at the cost of shard, and each other choice."""
    changes: list[dict[str, Any]] = []
    for key in ("tensor", "context", "pipeline", "replicate", "micro_batch"):
        value = getattr(layout, key)
        changes += [{key: value * 2}, *([{key: value // 2}] if value > 1 and value % 2 == 0 else [])]
    others = (("recompute", ("none", "selective", "block")), ("reshard", ("always", "never")))
    for key, values in (*others, *([("reduce", ("step", "micro_batch"))] if layout.pipeline == 1 else [])):
        changes += [{key: value} for value in values if value != getattr(layout, key)]
    if layout.pipeline > 1:
        schedules = ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")
        changes += [{"schedule": name, "stages_per_rank": 0} for name in schedules if name != layout.schedule]
    if layout.pipeline > 1 and layout.schedule == "interleaved":
        stages = layout.stages_per_rank or 2
        changes += [{"stages_per_rank": more} for more in (stages - 1, stages + 1) if more > 1]
    return changes


def _command(run: str, overrides: Sequence[str], number: int, layout: Sequence[str]) -> str:
    return join(["minka", "train", run, *overrides, *layout, *BENCHMARK, f"run.name=benchmark-{number}"])


def layout_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of a table for people."""
    rows = [["layout", "step", "memory", "MFU", "settings"]]
    for number, one in enumerate(found["layouts"], 1):
        words = settings_text(one["layout"])
        size = f"{one['peak_bytes'] / 2**30:.1f} GiB"
        rows.append([f"{number}", f"{one['step_seconds']:.3g} s", size, f"{one['mfu']:.1%}", words])
    first = found["layouts"][0]["step_seconds"]
    rows.append(["change of 1", "step", "memory", "", ""])
    for row in found["neighbours"]:
        name = ", ".join(f"{key}={value}" for key, value in row["change"].items() if value)
        if row["refused"]:
            rows.append([f"  {name}", "-", "-", "", f"not legal: {row['refused']}"])
            continue
        fits = "" if row["fits"] else "does not fit"
        change = f"{row['step_seconds'] / first - 1:+.1%}"
        rows.append([f"  {name}", change, f"{row['peak_bytes'] / 2**30:.1f} GiB", "", fits])
    return rows


def settings_text(layout: Mapping[str, Any]) -> str:
    """Return all of a layout that is not the default, in the words of its section."""
    default = Layout()
    return " ".join(f"{key}={layout[key]}" for key in (*AXES, *KEYS) if layout[key] != getattr(default, key))


def layout_notes(found: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: why the first one wins, what was left out, and the benchmark."""
    pruned = dict(found["pruned"])
    large = pruned.pop("memory", 0)
    lines = []
    if found["pinned"]:
        lines.append("only those with " + ", ".join(f"{key}={value}" for key, value in found["pinned"].items()))
    lines += [
        f"{found['searched']:,} legal layouts on {found['world']:,} {found['gpu']}, of which {large:,} do not fit"
    ]
    if pruned:
        lines.append("left out: " + "; ".join(f"{count:,} {reason}" for reason, count in pruned.items()))
    lines += [found["why"], f"times are {found['calibrated']}"]
    if refused := found["layouts"][0]["warmup_refused"]:
        lines.append(f"note: 1 is not legal during the batch warm-up: {refused}; change data.batch_warmup")
    if found["benchmark"]:
        lines += ["these are within 5 %; twenty steps of each would decide:", *found["benchmark"]]
    return lines
