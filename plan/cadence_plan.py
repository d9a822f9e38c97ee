"""`minka plan cadence`: intervals of saves and evaluations, what to keep, spare nodes, and the time they leave."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minka.plan.cadence import GPUS_OF_A_NODE, RATES, Cadence, hours_between_failures, spare_nodes
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.flops import parameters
from minka.plan.load_config import load_run
from minka.plan.time_plan import duration

STATE_BYTES = 12  # a weight of a checkpoint: fp32 weights and two moments
EVALUATION_SHARE = 0.01  # of training time
NEWEST = 3
LEAST_TRAINING = 0.05  # of wall time
LONGEST = 1e7  # seconds or hours
REWIND_STEPS = 100  # a spike is left behind by going back so far (PaLM, arXiv:2204.02311, section 5.1)


class CadenceAsked(NamedTuple):
    """What was said; None: not known."""

    gpus: int = 8
    mtbf_hours: float | None = None
    rate: str = "rsc-1"
    save_seconds: float = 20.0
    flush_seconds: float = 0.0
    restart_seconds: float = 600.0
    step_seconds: float | None = None
    evaluation_seconds: float | None = None
    repair_hours: float = 24.0
    run: str = ""


def cadence_plan(asked: CadenceAsked) -> dict[str, Any]:
    """Return what the JSON has. Raises UserError for numbers out of range and for an unknown rate."""
    _check(asked)
    config = load_run(asked.run).config if asked.run else None
    hours = asked.mtbf_hours or hours_between_failures(asked.gpus, asked.rate)
    source = "--mtbf-hours" if asked.mtbf_hours else RATES[asked.rate].source
    cadence = Cadence(asked.save_seconds, asked.restart_seconds, hours * 3600, asked.flush_seconds)
    best = cadence.best
    step = asked.step_seconds
    interval = best if step is None else max(1, round(best / step)) * step
    shares = cadence.goodput(interval)
    if shares.training < LEAST_TRAINING:
        what = f"of wall time {shares.training:.1%} would train: it fails every {hours:.3g} h"
        remedy = "save and restart faster, or use fewer machines"
        raise UserError(what, where="minka plan cadence", remedy=remedy)
    nodes = math.ceil(asked.gpus / GPUS_OF_A_NODE)
    evaluation = asked.evaluation_seconds
    between = None if evaluation is None else evaluation / EVALUATION_SHARE
    return {
        "gpus": asked.gpus,
        "hours_between_failures": hours,
        "failures_source": source,
        "interval_seconds": interval,
        "interval_steps": None if step is None else round(interval / step),
        "assumed": {"save": asked.save_seconds, "restart": asked.restart_seconds, "repair": asked.repair_hours},
        "young_seconds": cadence.young,
        "daly_seconds": cadence.daly,
        "ettr": shares.training,
        "lost": {"saving": shares.saving, "again": shares.again, "restarting": shares.restarting},
        "evaluation_interval_seconds": between,
        "evaluation_interval_steps": None if between is None or step is None else math.ceil(between / step),
        "spare_nodes": spare_nodes(nodes, hours, asked.repair_hours),
        "keep": _keep(config, None if step is None else round(interval / step)),
    }


def _check(asked: CadenceAsked) -> None:
    if asked.rate not in RATES:
        raise UserError(f"no rate {asked.rate!r} is known", where="--rate", remedy=f"known: {', '.join(RATES)}")
    for name in ("mtbf_hours", "save_seconds", "restart_seconds", "step_seconds", "evaluation_seconds", "repair_hours"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < LONGEST:
            where = "--" + name.replace("_", "-")
            raise UserError(f"{value:g}", where=where, remedy=f"give a number between 0 and {LONGEST:g}")
    if not 0 <= asked.flush_seconds < LONGEST:
        raise UserError(f"{asked.flush_seconds:g}", where="--flush-seconds", remedy="give 0 or more")


def _keep(config: RunConfig | None, interval_steps: int | None) -> dict[str, Any]:
    """Which checkpoints are worth their disk: newest ones, one to rewind to, branch points of the schedule."""
    rewind = None if interval_steps is None else max(NEWEST, math.ceil(REWIND_STEPS / interval_steps) + 1)
    found: dict[str, Any] = {"newest": rewind or NEWEST, "tokens": [], "checkpoint_bytes": None, "bytes": None}
    if config is None:
        return found
    total = config.total_tokens
    if config.schedule.kind == "wsd":
        decay = config.schedule.decay * (config.data.batch_tokens if config.schedule.unit == "steps" else 1)
        found["tokens"] = [total - (decay or total // 5)]
    size = STATE_BYTES * parameters(config.model)
    return found | {"checkpoint_bytes": size, "bytes": size * (found["newest"] + len(found["tokens"]) + 1)}


def cadence_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    lost, keep = found["lost"], found["keep"]
    steps = "" if found["interval_steps"] is None else f"{found['interval_steps']:,} steps; "
    approximations = f"Young {found['young_seconds']:,.0f} s, Daly {found['daly_seconds']:,.0f} s"
    assumed = "a save stalls {save:g} s, a restart takes {restart:g} s, a repair {repair:g} h"
    rows = [
        ["failures", f"every {found['hours_between_failures']:,.3g} h", found["failures_source"]],
        ["assumed", "", assumed.format(**found["assumed"])],
        ["save every", duration(found["interval_seconds"] / 86_400), steps + approximations],
        ["training", f"{found['ettr']:.1%}", "of wall time"],
        ["  saves", f"{lost['saving']:.1%}", ""],
        ["  trained again", f"{lost['again']:.1%}", "after failures"],
        ["  restarts", f"{lost['restarting']:.1%}", ""],
    ]
    if found["evaluation_interval_seconds"]:
        steps = found["evaluation_interval_steps"]
        often = f"{found['evaluation_interval_seconds']:,.0f} s"
        rows.append(["evaluate every", often, f"{steps:,} steps" if steps else f"{EVALUATION_SHARE:.0%} of the time"])
    rows.append(["spare nodes", f"{found['spare_nodes']:,}", "cover what is in repair in 99 % of the time"])
    rows.append(["keep", f"{keep['newest']}", f"newest, to rewind {REWIND_STEPS} steps; and the last"])
    rows += [["  at", f"{tokens:,}", "tokens: where the decay begins"] for tokens in keep["tokens"]]
    if keep["bytes"]:
        rows.append(["  disk", f"{keep['bytes'] / 1e9:,.1f} GB", f"{keep['checkpoint_bytes'] / 1e9:,.1f} GB each"])
    return rows
