"""Everything that the page shows, as one JSON value: runs, their curves, tables and lineage."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from minka.plan.load_config import flatten
from minka.plan.run_folder import RunFolder
from minka.report.curves import curves, step_columns, time_split
from minka.report.eval_scores import eval_scores, newest_samples, own_settings, score_curves
from minka.report.events import changed_settings, events, format_bytes
from minka.report.headline import headline
from minka.report.lineage_graph import lineage_graph
from minka.report.run_files import RunFiles
from minka.report.run_status import run_status

POINTS, ALL_POINTS, MIN_POINTS = 2000, 6000, 250  # of a curve; of all runs' curves of one kind; in any case
MAX_CHECKPOINTS = 300
SHOWN_ELSEWHERE = frozenset({"event", "config", "changed", "lineage", "running_seconds"})  # fields of a start
PageData = dict[str, Any]


def page_data(runs: Sequence[RunFiles], now: float) -> PageData:
    """Return what to show of `runs` at `now`, in Unix seconds."""
    names = distinct_names([run.folder for run in runs])
    points = min(POINTS, max(MIN_POINTS, ALL_POINTS // len(runs)))
    return {
        "format": 1,
        "written": now,
        "points": points,
        "runs": [
            _run(run, name, now, points) | {"warnings": [*run.notes, *unlike_first(run, runs[0], names[0])]}
            for run, name in zip(runs, names, strict=True)
        ],
        "lineage": lineage_graph(runs, names),
    }


def unlike_first(run: RunFiles, first: RunFiles, name: str) -> list[str]:
    """Return a warning where `run` and the first run of the page, `name`, are scored with different settings."""
    own, other = own_settings(run.config), own_settings(first.config)
    unlike = [f"{key} {own[key]} against {other[key]}" for key in ("max_documents", "window") if own[key] != other[key]]
    if not unlike:
        return []
    return [f"scored with other settings than {name} ({', '.join(unlike)}): their scores are not comparable"]


def ended(page: PageData) -> bool:
    """Return whether every run of the page has ended."""
    return all(run["status"]["ended"] for run in page["runs"])


def distinct_names(folders: Sequence[RunFolder]) -> list[str]:
    """Return a name for each run: its folder's, with as much of the path as makes it differ from the others."""
    parts = [folder.path.resolve().parts for folder in folders]
    names = [p[-1] for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        count = Counter(names)
        names = ["/".join(p[-depth:]) if count[name] > 1 else name for p, name in zip(parts, names, strict=True)]
    return names


def checkpoint_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Return checkpoints, newest first: those in the ledger, and those that are only on disk."""
    found: dict[str, dict[str, Any]] = {}
    for event in run.events:
        if event["event"] == "save":
            name = str(event.get("path", "")).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
            fields = ("step", "tokens", "stall_seconds", "total_seconds", "permanent")
            found[name] = {key: event.get(key) for key in fields} | {"size": format_bytes(event.get("bytes"))}
    for name, step in run.checkpoints.items():
        found.setdefault(name, {"step": step, "only_on_disk": True})
    rows = [row | {"name": name, "on_disk": name in run.checkpoints} for name, row in found.items()]
    return sorted(rows, key=lambda row: int(row["step"]), reverse=True)


def _run(run: RunFiles, name: str, now: float, points: int) -> dict[str, Any]:
    status = run_status(run, now)
    steps = step_columns(run)
    scores = eval_scores(run, steps)
    saved = checkpoint_rows(run)
    newest_start = run.starts[-1] if run.starts else {}
    return {
        "name": name,
        "status": status,
        "headline": headline(run, steps, status, scores),
        "steps": len(steps["step"]),
        "curves": curves(steps, points),
        "events": events(run.kept),
        "scores": score_curves(scores),
        "time": time_split(run, steps),
        "config": run.config,
        "changed": [[*change, start["step"]] for start in run.starts for change in changed_settings(start)],
        "started": {key: value for key, value in newest_start.items() if key not in SHOWN_ELSEWHERE},
        "provenance": flatten(run.provenance),
        "checkpoints": saved[:MAX_CHECKPOINTS],
        "checkpoints_left_out": max(0, len(saved) - MAX_CHECKPOINTS),
        "samples": newest_samples(run),
        "plan_file": run.plan_file,
    }
