"""Everything the page shows, as one JSON value: runs, their curves, tables and lineage."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from minka.plan.ledger import number
from minka.plan.load_config import flatten
from minka.report.downsample import plain
from minka.report.events import marks
from minka.report.figures import checkpoints, figures, scores, time_split, unlike
from minka.report.lineage import Graph
from minka.report.load_run import Event, Run
from minka.report.run_status import RunStatus, state_of
from minka.report.running_time import Clock
from minka.report.series import columns, curves

POINTS, ALL_POINTS, FEWEST_POINTS = 2000, 6000, 250  # of a curve; of all runs' curves of one kind; whatever happens
MOST_CHECKPOINTS = 300
FORMAT = 1


class Document(NamedTuple):
    """`page` goes into the page, `numbers` is what `--json` prints."""

    page: dict[str, Any]
    numbers: dict[str, Any]
    states: list[RunStatus]


def document(runs: Sequence[Run], now: float) -> Document:
    """What is to be shown of `runs` at `now`, in Unix seconds."""
    names = unlike([run.folder for run in runs])
    points = min(POINTS, max(FEWEST_POINTS, ALL_POINTS // len(runs)))
    states = [state_of(run, now) for run in runs]
    shown = [_run(run, name, state, points) for run, name, state in zip(runs, names, states, strict=True)]
    graph = Graph()
    graph.add(runs, names)
    page = {"format": FORMAT, "written": now, "points": points, "runs": shown, "lineage": graph.as_json()}
    return Document(page, {"format": FORMAT, "runs": [run["figures"] for run in shown]}, states)


def _run(run: Run, name: str, state: RunStatus, points: int) -> dict[str, Any]:
    clock = Clock(run.events)
    table = columns(run, clock)
    scored = scores(run, table, clock)
    saved = checkpoints(run)
    starts = [event for event in run.events if event["event"] == "start"]
    return {
        "name": name,
        "state": {"kind": state.kind, "label": state.label, "why": state.why},
        "figures": figures(run, table, clock, state, [p for p in scored if p["suite"] == "heldout"]),
        "steps": len(table.step),
        "curves": curves(table, points),
        "marks": marks(run.kept, clock),
        "scores": _scores(scored),
        "time": time_split(run, table, clock),
        "config": run.config,
        "changed": _changed(starts),
        "started": {k: v for k, v in starts[-1].items() if k not in UNTOLD} if starts else {},
        "provenance": flatten(run.provenance),
        "checkpoints": saved[:MOST_CHECKPOINTS],
        "checkpoints_left_out": max(0, len(saved) - MOST_CHECKPOINTS),
        "samples": _samples(run),
        "plan_file": run.plan,
    }


UNTOLD = frozenset({"event", "config", "changed", "lineage"})  # of a start: shown elsewhere


def _scores(points: Sequence[Event]) -> dict[str, dict[str, list[Any]]]:
    """Per score, by its name (and suite, if there are more): {"step", "tokens", "seconds", "value", "stderr"}."""
    suites = {point["suite"] for point in points}
    found: dict[str, dict[str, list[Any]]] = {}
    for point in points:
        for name, value in point["scores"].items():
            label = name if len(suites) == 1 else f"{point['suite']}: {name}"
            curve = found.setdefault(label, {key: [] for key in ("step", "tokens", "seconds", "value", "stderr")})
            for key in ("step", "tokens", "seconds"):
                curve[key].append(point[key])
            curve["value"] += plain([number(value)])
            curve["stderr"] += plain([number(point["stderr"].get(name))])
    return found


def _changed(starts: Sequence[Event]) -> list[dict[str, Any]]:
    """Each value that a start changed, in order: key, old, new, at which step."""
    rows = []
    for start in starts:
        changed = start.get("changed")
        for key, pair in (changed if isinstance(changed, dict) else {}).items():
            if isinstance(pair, list) and len(pair) == 2:
                rows.append({"key": key, "old": pair[0], "new": pair[1], "step": start["step"]})
    return rows


def _samples(run: Run) -> dict[str, Any] | None:
    """What the newest evaluation with samples wrote."""
    for result in reversed(run.evals):
        texts = result.get("samples")
        if isinstance(texts, list) and texts:
            pairs = [(str(t.get("prompt", "")), str(t.get("text", ""))) for t in texts if isinstance(t, dict)]
            return {"step": result["step"], "texts": pairs}
    return None
