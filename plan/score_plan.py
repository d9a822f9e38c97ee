"""`minka plan score RUNS`: what was planned for runs and what came of it, misses included."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minka.plan.errors import UserError
from minka.plan.fit_runs import final_loss
from minka.plan.ledger import current, number, read_ledger
from minka.plan.load_config import validate
from minka.plan.outlook import plan_hash
from minka.plan.read_file import read_json
from minka.plan.run_folder import find_run


def score_plan(runs: Sequence[str]) -> dict[str, Any]:
    """Return what the JSON has: a row for each run, and how near plans came. Raises UserError where no run has one."""
    rows = [_row(run) for run in runs]
    losses = [row for row in rows if row["loss_error"] is not None]
    within = [row["within"] for row in losses if row["within"] is not None]
    speeds = [row["speed_error"] for row in rows if row["speed_error"] is not None]
    if not any(row["planned"] for row in rows):
        remedy = "plan runs with `minka plan budget --emit`: their plan.json is what is scored"
        raise UserError("none of these runs has a plan", where="minka plan score", remedy=remedy)
    return {
        "scores": rows,
        "loss_mean_error": statistics.mean(abs(row["loss_error"]) for row in losses) if losses else None,
        "loss_within": sum(within) / len(within) if within else None,
        "speed_mean_error": statistics.mean(map(abs, speeds)) if speeds else None,
    }


def _row(given: str) -> dict[str, Any]:
    folder = find_run(given)
    file = folder.path / "plan.json"
    planned = read_json(file, remedy="leave the run out") if file.exists() else {}
    events = current(read_ledger(folder.ledger_file))
    starts = [event for event in events if event["event"] == "start"]
    speeds = [number(event.get("tokens_per_second")) for event in events if event["event"] == "step"]
    done = any(event["event"] == "stop" and event.get("reason") == "done" for event in events)
    row: dict[str, Any] = {
        "run": folder.path.name,
        "planned": bool(planned),
        "unchanged": None,
        "ended": done,
        "planned_loss": planned.get("loss"),
        "planned_interval": planned.get("loss_interval"),
        "final_loss": final_loss(folder) if done else None,
        "loss_error": None,
        "within": None,
        "speed_error": None,
    }
    if planned.get("hash") and starts:
        config = validate(dict(starts[0].get("config", {})), f"{folder.ledger_file}, its first start")
        row["unchanged"] = planned["hash"] == plan_hash(config, planned)
    if row["planned_loss"] and row["final_loss"]:
        row["loss_error"] = row["planned_loss"] / row["final_loss"] - 1
        low, high = row["planned_interval"] or (None, None)
        row["within"] = None if low is None or high is None else low <= row["final_loss"] <= high
    each, world = number(planned.get("tokens_per_second_per_gpu")), number(planned.get("world"))
    measured = [speed for speed in speeds if speed > 0]
    if each * world > 0 and measured:
        row["speed_error"] = each * world / statistics.median(measured) - 1
    return row


def score_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people, under their head."""
    rows = [["run", "planned", "loss", "error", "interval", "speed", ""]]
    for row in found["scores"]:
        loss = "-" if row["planned_loss"] is None else f"{row['planned_loss']:.3f}"
        actual = "-" if row["final_loss"] is None else f"{row['final_loss']:.3f}"
        within = {None: "-", True: "within", False: "missed"}[row["within"]]
        said = "" if row["planned"] else "no plan"
        said += "the plan was changed after it began" if row["unchanged"] is False else ""
        said += "" if row["ended"] else " has not ended"
        rows.append(
            [row["run"], loss, actual, _share(row["loss_error"]), within, _share(row["speed_error"]), said.strip()]
        )
    covered = "-" if found["loss_within"] is None else f"{found['loss_within']:.0%}"
    mean = ["all", "", "", _size(found["loss_mean_error"]), covered, _size(found["speed_mean_error"]), "mean of sizes"]
    return [*rows, mean]


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


def _size(error: float | None) -> str:
    return "-" if error is None else f"{error:.1%}"
