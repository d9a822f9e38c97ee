"""Where runs come from, as a graph: a lane for each run, a row for what happened to it, a link for each fork."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.ledger import RETURNS
from minka.report.events import TEXTS, describe_changes
from minka.report.run_files import Event, RunFiles

MAX_ROWS = 24  # of one run; the middle of a longer history is folded into one row
TITLES = {
    "start": "started again",
    "restore": "resumed",
    "rewind": "rewound",
    "restart": "restarted",
    "fallback": "checkpoint skipped",
    "stop": "ended",
}
Row = dict[str, Any]


class Lane(NamedTuple):
    """One run. `run` is its index on the page, None for a parent that is not on the page."""

    name: str
    run: int | None
    rows: list[Row]


def lineage_graph(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Any]:
    """Return {"lanes", "rows", "links": [[from row, to row]]}. Rows of a lane stand together, parents come first."""
    lanes: dict[str, Lane] = {}
    order = sorted(range(len(runs)), key=lambda index: len(runs[index].parents))
    for index in order:
        for parent in reversed(_parents(runs[index])):
            folder = str(parent["folder"])
            lanes.setdefault(_key(folder), Lane(str(parent.get("run") or Path(folder).name), None, []))
    for index in order:
        key = _key(str(runs[index].folder.path))
        lanes.pop(key, None)  # the parent of a run above: it is shown whole
        lanes[key] = Lane(names[index], index, history_rows(runs[index]))
    forks = []
    for index in order:
        child = _key(str(runs[index].folder.path))
        for parent in _parents(runs[index]):
            key = _key(str(parent["folder"]))
            forks.append((_fork_row(lanes[key].rows, parent), child))
            child = key
    rows = [row for lane in lanes.values() for row in lane.rows]
    for number, lane in enumerate(lanes.values()):
        for row in lane.rows:
            row["lane"] = number
    place = {id(row): i for i, row in enumerate(rows)}
    links = []
    for fork, child in forks:
        link = [place[id(fork)], place[id(lanes[child].rows[0])] if lanes[child].rows else -1]
        if link[0] < link[1] and link not in links:
            links.append(link)
    return {"lanes": [{"name": lane.name, "run": lane.run} for lane in lanes.values()], "rows": rows, "links": links}


def history_rows(run: RunFiles) -> list[Row]:
    """Return a row for each time the run started, resumed, skipped a checkpoint, or ended."""
    rows: list[Row] = []
    reached = 0
    for event in run.events:
        kind, step = event["event"], event["step"]
        if kind == "step":
            reached = max(reached, step)
        if kind not in TITLES:
            continue
        row = _history_row(event, reached, first=not any(r["kind"] == "start" for r in rows))
        if kind == "start" and rows and (rows[-1]["kind"], rows[-1]["step"]) == ("restore", step):
            rows[-1]["text"] = _join(rows[-1]["text"], row["text"])  # one resume, two events
            continue
        if kind in RETURNS:
            reached = step
        rows.append(row)
    if rows and rows[0]["kind"] == "start":
        rows[0]["text"] = _join(_origin(run), rows[0]["text"])
    return _fold(rows)


def _history_row(event: Event, reached: int, *, first: bool) -> Row:
    kind, step, reason = event["event"], event["step"], event.get("reason")
    title = TITLES[kind]
    if kind == "start" and first:
        title = "started"
    elif kind == "stop" and reason == "done":
        title = "finished"
    text = "" if kind == "restore" or reason == "done" else TEXTS[kind](event)  # the titles say it
    lost = max(0, reached - step) if kind in RETURNS else 0
    repeat = f"{lost:,} {'step' if lost == 1 else 'steps'} to repeat" if lost else ""
    text = _join(text, repeat, describe_changes(event))
    return {"kind": kind, "step": step, "title": title, "text": text, "time": event["time"], "lost": lost}


def _fork_row(rows: list[Row], parent: dict[str, Any]) -> Row:
    """Return the row of a fork at the parent's step. A new one stands before later steps, never before the start."""
    given = parent.get("step")
    step = given if isinstance(given, int) else 0
    for row in rows:
        if row["kind"] == "fork" and row["step"] == step:
            return row
    loaded = "weights" if parent.get("with") == "weights" else "weights and optimizer"
    text = f"{loaded} taken from {str(parent.get('sha256', ''))[:12]}; {parent.get('folder')}"
    fork = {"kind": "fork", "step": step, "title": "forked", "text": text, "time": None, "lost": 0}
    later = (i for i, row in enumerate(rows) if row["step"] > step and row["kind"] != "start")
    rows.insert(next(later, len(rows)), fork)
    return fork


def _origin(run: RunFiles) -> str:
    if not run.parents:
        return ""
    parent = run.parents[0]
    changed = describe_changes(parent)
    name = parent.get("run") or parent.get("folder")
    return f"from {name} at step {parent.get('step')}" + (f", with {changed}" if changed else "")


def _fold(rows: list[Row]) -> list[Row]:
    if len(rows) <= MAX_ROWS:
        return rows
    head, tail = rows[: MAX_ROWS // 3], rows[-(MAX_ROWS - MAX_ROWS // 3) :]
    left = len(rows) - len(head) - len(tail)
    fold = {"kind": "fold", "step": head[-1]["step"], "title": f"{left:,} more", "text": "", "time": None, "lost": 0}
    return [*head, fold, *tail]


def _parents(run: RunFiles) -> list[dict[str, Any]]:
    return [parent for parent in run.parents if parent.get("folder")]


def _join(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def _key(folder: str) -> str:
    try:
        return str(Path(folder).resolve())
    except (ValueError, OSError, RuntimeError):  # not a path, or a loop of links
        return folder
