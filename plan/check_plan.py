"""`minka plan check RUN`: the run against its plan, where its curve ends, and whether to continue, probe or stop."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.flops import parameters
from minka.plan.forecast import CheckRules, CheckVerdict, Point, check_run
from minka.plan.law_file import law_of_name
from minka.plan.ledger import current, number, read_ledger
from minka.plan.load_config import validate
from minka.plan.read_file import read_json
from minka.plan.run_folder import RunFolder, find_run
from minka.plan.time_plan import DAY, duration

WHERE = "minka plan check"
READINGS = 50  # of the speed, the newest


class CheckTarget(NamedTuple):
    """The loss that a run should end at, and who says so."""

    loss: float
    source: str


def check_plan(run: str, loss: float | None, law: str, rules: CheckRules) -> dict[str, Any]:
    """Return what the JSON has. Raises UserError for a run that has not trained, and where nothing says its target."""
    folder = find_run(run)
    events = current(read_ledger(folder.ledger_file))
    starts = [event for event in events if event["event"] == "start"]
    steps = [event for event in events if event["event"] == "step"]
    if not starts or not steps:
        raise UserError("the run has not trained yet", where=str(folder.path), remedy="train it, then check it")
    config = validate(dict(starts[-1].get("config", {})), f"{folder.ledger_file}, its last start")
    newest, end = steps[-1], config.end(steps[-1]["step"], steps[-1]["tokens"])[1]
    planned = _plan_file(folder)
    target = _target(config, end, loss, law)
    verdict = _judged(config, steps, end, target.loss, rules)
    readings = [number(event.get("tokens_per_second")) for event in steps[-READINGS:]]
    speeds = [reading for reading in readings if reading > 0]
    speed = statistics.median(speeds) if speeds else None
    return {
        "run": folder.path.name,
        "action": verdict.action,
        "reason": verdict.reason,
        "step": newest["step"],
        "tokens": newest["tokens"],
        "tokens_of_the_run": end,
        "loss": number(newest.get("loss")),
        "forecast": verdict.forecast._asdict() if verdict.forecast else None,
        "target": target.loss,
        "target_source": target.source,
        "rules": rules._asdict(),
        "tokens_per_second": speed,
        "tokens_per_second_planned": _planned_speed(planned),
        "days_left": (end - newest["tokens"]) / speed / DAY if speed else None,
    }


def _plan_file(folder: RunFolder) -> dict[str, Any]:
    file = folder.path / "plan.json"
    return read_json(file, remedy="delete it: it only says what was planned") if file.exists() else {}


def _planned_speed(planned: Mapping[str, Any]) -> float | None:
    each, world = number(planned.get("tokens_per_second_per_gpu")), number(planned.get("world"))
    return each * world if each * world > 0 else None


def _target(config: RunConfig, tokens: int, loss: float | None, law: str) -> CheckTarget:
    if loss is not None:
        if not 0 < loss < math.inf:
            raise UserError(f"{loss:g}", where="--loss", remedy="give nats a token, above 0")
        return CheckTarget(loss, "--loss")
    if not law and config.plan.loss is not None:
        return CheckTarget(config.plan.loss, f"plan.loss of the run, by the law {config.plan.law!r}")
    if not law:
        remedy = "add --loss 2.1, or --law own.toml of `minka plan fit`, or the name of a published law of your text"
        raise UserError("nothing says what the run should end at", where=WHERE, remedy=remedy)
    found = law_of_name(law)
    return CheckTarget(found.loss(parameters(config.model), tokens), f"law {found.name!r}")


def _judged(
    config: RunConfig, steps: Sequence[Mapping[str, Any]], end: int, target: float, rules: CheckRules
) -> CheckVerdict:
    peak = config.optimizer.learning_rate
    points = [
        Point(event["tokens"], number(event.get("loss")), number(event.get("learning_rate")) / peak) for event in steps
    ]
    warmed_up = config.schedule.warmup * (1 if config.schedule.unit == "tokens" else config.data.batch_tokens)
    points = [point for point in points if point.tokens > warmed_up]
    kind, horizon = config.schedule.kind, config.horizon
    final = 1.0 if kind == "constant" else config.schedule.final_ratio
    decay = config.schedule.decay or horizon // 5
    at = steps[-1]["step" if config.schedule.unit == "steps" else "tokens"]
    stable = kind == "wsd" and at < horizon - decay
    return check_run(points, end, target, final_rate=final, stable=stable, rules=rules)


def check_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    seen = found["tokens"] / found["tokens_of_the_run"]
    rows = [
        [found["action"], "", found["reason"]],
        ["seen", f"{seen:.0%}", f"{found['tokens']:,} of {found['tokens_of_the_run']:,} tokens"],
        ["loss", f"{found['loss']:.3f}", "of the newest step"],
        ["target", f"{found['target']:.3f}", found["target_source"]],
    ]
    if found["forecast"]:
        ends = found["forecast"]
        rows.append(["ends at", f"{ends['value']:.3f}", f"{ends['low']:.3f} to {ends['high']:.3f}"])
    if found["tokens_per_second"]:
        planned = found["tokens_per_second_planned"]
        against = (
            "" if planned is None else f"; planned {planned:,.0f}, {found['tokens_per_second'] / planned:.0%} of it"
        )
        rows.append(["speed", f"{found['tokens_per_second']:,.0f}", f"tokens a second{against}"])
        rows.append(["left", duration(found["days_left"]), "at this speed"])
    return rows
