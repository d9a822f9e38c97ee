"""The headline numbers of a run: progress against the plan, newest loss, best score, speed. `--json` prints these.

Scores are those of the run's newest settings: the lowest of different sets of documents would be the easiest set's.
"""

import math
from collections import Counter
from typing import Any

from minka.report.curves import Columns
from minka.report.run_files import Event, RunFiles

SPEED_STEPS = 200  # newest steps that the remaining time is estimated from
SUITE, SCORE = "heldout", "bits_per_byte"


def headline(
    run: RunFiles, steps: Columns, status: dict[str, Any], scores: dict[tuple[str, str], list[Event]]
) -> dict[str, Any]:
    """Return the numbers at the head of the page."""
    newest = run.events[-1] if run.events else {"step": 0, "tokens": 0, "running_seconds": 0.0}
    last: Event = next((event for event in reversed(run.kept) if event["event"] == "step"), {})
    at = {key: last.get(key, newest[key]) for key in ("step", "tokens")}
    scored = [
        {"suite": SUITE, "step": point["step"], SCORE: point["value"], "stderr": point["stderr"]}
        for point in scores.get((SUITE, SCORE), [])
        if math.isfinite(point["value"])
    ]
    counts = Counter(event["event"] for event in run.events)
    return {
        "run": run.folder.path.name,
        "path": str(run.folder.path),
        "status": status["kind"],
        "why": status["why"],
        **at,
        "loss": last.get("loss"),
        SCORE: scored[-1][SCORE] if scored else None,
        "best": min(scored, key=lambda score: float(score[SCORE]), default=None),
        "newest_score": scored[-1] if scored else None,
        "tokens_per_second": last.get("tokens_per_second"),
        "mfu": last.get("mfu"),
        "running_seconds": round(newest["running_seconds"], 3),
        "plan": _plan(run, steps, at, status),
        "events": dict(sorted(counts.items())),
        "steps_void": counts["step"] - len(steps["step"]),
        "torn_lines": run.torn_lines,
        "notes": run.notes,
    }


def _plan(run: RunFiles, steps: Columns, at: Event, status: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the configuration asks for, the share that is done, and the time left at the current speed."""
    if run.planned is None:
        return None
    total_steps, total_tokens = run.planned.total_steps, run.planned.total_tokens
    by_steps = run.planned.run.max_steps is not None
    done = at["step"] / total_steps if by_steps else at["tokens"] / total_tokens
    left = source = None
    count = min(SPEED_STEPS, len(steps["step"]))
    if done < 1 and status["kind"] in ("running", "stopped", "silent") and count > 1:
        seconds, tokens = (float(column[-1] - column[-count]) for column in (steps["seconds"], steps["tokens"]))
        if seconds > 0 and tokens > 0:
            left = round(max(0.0, total_tokens - at["tokens"]) * seconds / tokens, 1)
            source = f"mean of the last {count:,} steps, with their saves and evaluations"
    return {
        "end": "run.max_steps" if by_steps else "run.max_tokens",
        "steps": total_steps,
        "tokens": total_tokens,
        "done": round(min(1.0, done), 6),
        "seconds_left": left,
        "seconds_left_from": source,
    }
