"""Layouts drawn at random, small enough to be traced in seconds: where predicted memory is compared with dry runs."""

import math
import random
from typing import Any

QUIET = ["kernels.compile=false", "data.batch_warmup=[]", "run.max_tokens=none", "run.max_steps=9"]
QUIET += ["schedule.unit=steps", "schedule.warmup=0", "schedule.decay=0"]
SHARES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}  # stages of a rank
HALVES = ("zbv", "dualpipev")


def drawn(seed: int, *, pipeline: bool = False) -> tuple[str, list[str], int]:
    """A recipe of few layers, overrides, and ranks."""
    pick = random.Random(seed).choice
    ways = {"pipeline": pick([2, 2, 4]) if pipeline else 1}
    ways |= {"tensor": pick([1, 1, 2, 4]), "context": pick([1, 1, 2]), "shard": pick([1, 2, 8, 32])}
    ways["replicate"] = pick([1, 1, 2])
    recipe, rows, steps = pick(["dense-125m", "dense-1b", "llama3-8b"]), pick([1, 2, 4]), pick([1, 2, 5])
    precision = pick(["bf16", "bf16", "fp32"])
    weights = pick(["fp32", "fp32", "bf16"]) if precision == "bf16" else "fp32"
    reduce = pick(["step", "step", "micro_batch"]) if weights == "fp32" and not pipeline else "step"
    length = 4096 if recipe == "llama3-8b" else 2048
    settings = {f"layout.{axis}": value for axis, value in ways.items()} | {
        "layout.micro_batch": rows,
        "layout.recompute": pick(["none", "block", "selective"]),
        "layout.reshard": pick(["auto", "always", "never"]),
        "layout.reduce": reduce,
        "layout.precision": precision,
        "optimizer.weights": weights,
        "model.layers": pick([4, 8]),
        "data.seq_len": length,
    }
    if pipeline:
        more, steps = drawn_schedule(random.Random(seed), ways["pipeline"])
        settings |= more
        if more["layout.schedule"] in HALVES and settings["layout.reshard"] == "always":
            settings["layout.reshard"] = "auto"
    settings["data.batch_tokens"] = length * rows * steps * ways["shard"] * ways["replicate"]
    world = math.prod(ways.values())
    return recipe, [*QUIET, *(f"{key}={value}" for key, value in settings.items())], world


def drawn_schedule(random_: random.Random, pipeline: int) -> tuple[dict[str, Any], int]:
    """Settings of a schedule over `pipeline` coordinates, and micro-batches of a step."""
    pick = random_.choice
    schedule = pick([*SHARES])
    per_rank = pick([2, 3, 4]) if schedule == "interleaved" else SHARES[schedule]
    stages = pipeline * per_rank
    counts = [1 + pick([0, 1]) for _ in range(stages)]
    steps = {
        "gpipe": pick([1, 3, 8]),
        "1f1b": stages + pick([0, 1, 5]),
        "interleaved": pipeline * pick([1, 2, 3]),
        "zbv": pick([1, 3, 2 * pipeline, 4 * pipeline]),
        "dualpipev": stages + pick([0, 1, 6]),
    }
    more = {"layout.schedule": schedule, "model.layers": sum(counts), "model.tied": "false"}
    if schedule == "interleaved":
        more["layout.stages_per_rank"] = per_rank
    if pick([True, False, False]):
        more["layout.stages"] = f'"{",".join(map(str, counts))}"'
    return more, steps[schedule]
