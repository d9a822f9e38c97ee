"""What a run will need and take, in few lines: printed where it starts and by a dry run, kept as plan.json."""

import json
from hashlib import sha256
from typing import Any

from minka.plan.cluster import Cluster, find_cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.layout_search import MARGIN
from minka.plan.memory import predict_memory
from minka.plan.run_job import on_cluster
from minka.plan.time_plan import duration, time_plan

KEPT = ("step_seconds", "tokens_per_second_per_gpu", "mfu", "breakdown_seconds", "days", "gpu_hours", "dollars")


def planned_of(config: RunConfig, world: int, gpu: str) -> dict[str, Any]:
    """Return what a run's plan.json has: its outlook on a GPU of the table, and the loss that was planned for it.

    Empty where neither is known. `hash` is that of the rest and of the configuration: a plan that was changed after the
    run began is known by it.
    """
    found = outlook(config, world, gpu, config.plan.dollars_per_gpu_hour) if gpu else {}
    if config.plan.loss is not None:
        interval = [config.plan.loss_low, config.plan.loss_high]
        found |= {"law": config.plan.law, "loss": config.plan.loss, "loss_interval": interval}
    return {**found, "hash": plan_hash(config, found)} if found else {}


def plan_hash(config: RunConfig, planned: dict[str, Any]) -> str:
    """Return the hash of a run's configuration and of its plan, but for the plan's own hash."""
    rest = {key: value for key, value in planned.items() if key != "hash"}
    return sha256(json.dumps([config.model_dump(mode="json"), rest], sort_keys=True).encode()).hexdigest()


def outlook(config: RunConfig, world: int, gpu: str, dollars_per_hour: float | None = None) -> dict[str, Any]:
    """Return memory, time and cost of a run on `world` GPUs. Raises UserError where the layout is not legal there.

    `not_planned` says what is not predicted for this run; the keys of that are null then.
    """
    cluster = find_cluster(gpu)
    config = on_cluster(config, cluster)
    config.after_warmup().check(world)
    found: dict[str, Any] = {"gpu": cluster.name, "world": world, "not_planned": []}
    found |= dict.fromkeys(("peak_bytes", "fits", *KEPT))
    try:
        found["peak_bytes"] = max(rank.total for rank in predict_memory(config, world, cluster.device_kind))
        found["fits"] = found["peak_bytes"] <= (1 - MARGIN) * cluster.memory_bytes
    except UserError as error:
        found["not_planned"].append(str(error))
    try:
        planned = time_plan(config, world, cluster, dollars_per_hour)
        found |= {key: planned[key] for key in KEPT}
    except UserError as error:
        found["not_planned"].append(str(error))
    return found | {"assumes": _assumed(config, cluster)}


def _assumed(config: RunConfig, cluster: Cluster) -> str:
    compiled = "blocks compiled, memory as if they were not" if config.kernels.compile else "blocks not compiled"
    host = f"hosts of {cluster.host_gpus}"
    if cluster.network_gb:
        host += f" with {cluster.network_gb:g} GB/s of network for each GPU"
    return f"{compiled}; whole sequences attended; {host}; {cluster.rates.described()}"


def outlook_lines(found: dict[str, Any]) -> list[str]:
    """Return the same for people."""
    lines = []
    if found.get("loss") is not None:
        low, high = found["loss_interval"]
        between = "" if low is None or high is None else f", {low:.3f} to {high:.3f} in 90 % of runs"
        lines.append(f"plan: {found['loss']:.3f} nats a token at the end{between}, by the law {found['law']!r}")
    if "gpu" not in found:
        return lines
    gpus = f"{found['world']:,} x {found['gpu']}"
    if found["peak_bytes"] is not None:
        verdict = "fits" if found["fits"] else "does not fit"
        lines.append(
            f"plan: {found['peak_bytes'] / 2**30:.1f} GiB at the peak of the largest rank of {gpus}: {verdict}"
        )
    if found["step_seconds"] is not None:
        speed = f"{found['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, {found['mfu']['causal']:.0%} MFU"
        cost = "" if found["dollars"] is None else f", ${found['dollars']:,.0f}"
        lines.append(
            f"plan: {found['step_seconds']:.3g} s a step, {speed}; the run takes {duration(found['days'])}, "
            f"{found['gpu_hours']:,.0f} GPU-hours{cost}"
        )
    lines += [f"plan: {problem}" for problem in found["not_planned"]]
    return [*lines, f"plan assumes: {found['assumes']}"]
