"""The figures of a run: how far it is, against what was planned; what it scored; where its time went."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minka.plan.ledger import is_count, number
from minka.plan.run_folder import RunFolder
from minka.report.downsample import Numbers
from minka.report.load_run import Event, Run
from minka.report.run_status import RunStatus
from minka.report.running_time import Clock
from minka.report.series import PARTS, Columns, parts_of

SPEED_STEPS = 200  # newest steps by which the time that is left is told
HEADLINE = "bits_per_byte"


def figures(run: Run, table: Columns, clock: Clock, state: RunStatus, points: Sequence[Event]) -> dict[str, Any]:
    """The numbers at the head of the page, and all that `--json` prints of a run. `points` are its scores."""
    last = next((event for event in reversed(run.kept) if event["event"] == "step"), {})
    here = run.events[-1] if run.events else {"step": 0, "tokens": 0, "time": 0.0}
    at = {"step": last.get("step", here["step"]), "tokens": last.get("tokens", here["tokens"])}
    scored = [p for p in points if math.isfinite(_score(p))]
    best = min(scored, key=_score, default=None)
    counts = Counter(event["event"] for event in run.events)
    return {
        "run": run.folder.path.name,
        "path": str(run.folder.path),
        "status": state.kind,
        "why": state.why,
        "step": at["step"],
        "tokens": at["tokens"],
        "loss": last.get("loss"),
        "best": None if best is None else _told(best),
        "newest_score": None if not scored else _told(scored[-1]),
        "tokens_per_second": last.get("tokens_per_second"),
        "mfu": last.get("mfu"),
        "running_seconds": round(clock.seconds(here["time"]), 3),
        "plan": _plan(run, table, at, state),
        "events": dict(sorted(counts.items())),
        "steps_void": counts["step"] - len(table.step),
        "torn_lines": run.torn,
        "notes": run.notes,
    }


def time_split(run: Run, table: Columns, clock: Clock) -> dict[str, float]:
    """Running seconds by what they went to; `again`: steps that a return made void; `other`: starting, waiting."""
    ends = [event for event in run.events if event["event"] == "stop"]
    kept = {part: _sum(table.of[part]) for part in PARTS}
    split = {part: kept[part] + _sum(parts_of(ends, part)) for part in PARTS}
    steps = [event for event in run.events if event["event"] == "step"]
    if len(steps) > len(table.step):
        split["again"] = sum(_sum(parts_of(steps, part)) - kept[part] for part in PARTS)
    total = clock.seconds(run.events[-1]["time"]) if run.events else 0.0
    split["other"] = total - sum(split.values())
    return {name: round(max(0.0, seconds), 3) for name, seconds in split.items()}


def checkpoints(run: Run) -> list[dict[str, Any]]:
    """Checkpoints, newest first: those the ledger tells of, and those on disk that it does not."""
    told: dict[str, dict[str, Any]] = {}
    for event in run.events:
        if event["event"] == "save":
            name = str(event.get("path", "")).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
            wanted = ("step", "tokens", "bytes", "stall_seconds", "total_seconds", "permanent")
            told.pop(name, None)  # written again: it counts where it was written last
            told[name] = {key: event.get(key) for key in wanted} | {"name": name}
    for name, step in run.there.items():
        told.setdefault(name, {"name": name, "step": step, "untold": True})
    rows = sorted(told.values(), key=lambda row: int(row["step"]), reverse=True)
    return [row | {"there": row["name"] in run.there} for row in rows]


def scores(run: Run, table: Columns, clock: Clock) -> list[Event]:
    """Scores by step: those of the ledger, and those that were made of its checkpoints afterwards (evals/)."""
    found: dict[tuple[str, int], Event] = {}
    for event in run.kept:
        if event["event"] == "eval" and isinstance(event.get("scores"), dict):
            suite = str(event.get("suite", ""))
            found[suite, event["step"]] = _point(event, suite, clock.seconds(event["time"]))
    end = max([*table.step.tolist(), *(step for _, step in found)], default=math.inf)
    for result in run.evals:
        if result["step"] <= end:  # one beyond is of steps that a return made void
            seconds = float(np.interp(result["step"], table.step, table.seconds)) if len(table.step) else 0.0
            found.setdefault((result["suite"], result["step"]), _point(result, result["suite"], seconds))
    return sorted(found.values(), key=lambda point: (point["suite"], point["step"]))


def unlike(folders: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its folder's, with as much of the path before it as tells it from the others."""
    parts = [folder.path.resolve().parts for folder in folders]
    names = [p[-1] for p in parts]
    for depth in range(2, max((len(p) for p in parts), default=0) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        names = ["/".join(p[-depth:]) if name in twice else name for p, name in zip(parts, names, strict=True)]
    return names


def _point(told: Event, suite: str, seconds: float) -> Event:
    errors = told.get("stderr")
    return {
        "suite": suite,
        "step": told["step"],
        "tokens": told["tokens"] if is_count(told.get("tokens")) else None,
        "seconds": round(seconds, 2),
        "scores": told["scores"],
        "stderr": errors if isinstance(errors, dict) else {},
    }


def _score(point: Event) -> float:
    return number(point["scores"].get(HEADLINE))


def _told(point: Event) -> dict[str, Any]:
    error = point["stderr"].get(HEADLINE)
    return {"name": HEADLINE, "suite": point["suite"], "step": point["step"], "value": _score(point), "stderr": error}


def _plan(run: Run, table: Columns, at: Event, state: RunStatus) -> dict[str, Any] | None:
    """What the configuration asks for, how much of it is done, and how long the rest takes at the present speed."""
    if run.planned is None:
        return None
    steps, tokens = run.planned.total_steps, run.planned.total_tokens
    by_steps = run.planned.run.max_steps is not None
    done = at["step"] / steps if by_steps else at["tokens"] / tokens
    plan: dict[str, Any] = {"end": "run.max_steps" if by_steps else "run.max_tokens", "steps": steps, "tokens": tokens}
    plan |= {"done": round(min(1.0, done), 6), "seconds_left": None, "seconds_left_from": None}
    newest = slice(-min(SPEED_STEPS, len(table.step)), None)
    seconds, consumed = table.seconds[newest], table.tokens[newest]
    if done < 1 and state.kind in ("running", "stopped", "silent") and len(seconds) > 1 and seconds[-1] > seconds[0]:
        speed = (consumed[-1] - consumed[0]) / (seconds[-1] - seconds[0])
        if speed > 0:
            plan["seconds_left"] = round(max(0.0, tokens - at["tokens"]) / float(speed), 1)
            plan["seconds_left_from"] = f"mean of the last {len(seconds):,} steps, saves and evaluations included"
    return plan


def _sum(values: Numbers) -> float:
    return float(np.nansum(values))
