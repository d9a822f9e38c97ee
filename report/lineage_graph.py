"""Where runs come from, as a graph: a lane for each run, a row for what happened to it, a link for each fork."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minka.plan.ledger import RETURNS
from minka.report.events import TEXTS, changes_text
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


def lineage_graph(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Any]:
    """Return {"lanes", "rows", "links": [[from row, to row]]}. Rows of a lane stand together, parents come first.

    A lane is {"name", "run"}: the index of the run on the page, None for a parent that is not on the page.
    """
    lanes: dict[str, Row] = {}  # by folder
    rows_of: dict[str, list[Row]] = defaultdict(list)
    order = sorted(range(len(runs)), key=lambda index: len(runs[index].parents))
    for index in order:
        for folder, parent in reversed([*zip(runs[index].parent_folders, runs[index].parents, strict=True)]):
            lanes.setdefault(_key(str(folder)), {"name": str(parent.get("run") or folder.name), "run": None})
    for index in order:
        key = _key(str(runs[index].folder.path))
        lanes.pop(key, None)  # the parent of a run above: it is shown whole
        lanes[key] = {"name": names[index], "run": index}
        rows_of[key] = history_rows(runs[index])
    forks = []
    for index in order:
        child = _key(str(runs[index].folder.path))
        for folder, parent in zip(runs[index].parent_folders, runs[index].parents, strict=True):
            key = _key(str(folder))
            forks.append((_fork_row(rows_of[key], parent), child))
            child = key
    rows = [row | {"lane": number} for number, key in enumerate(lanes) for row in rows_of[key]]
    place = {id(row): i for i, row in enumerate(row for key in lanes for row in rows_of[key])}
    links: list[list[int]] = []
    for fork, child in forks:
        link = [place[id(fork)], place[id(rows_of[child][0])] if rows_of[child] else -1]
        if link[0] < link[1] and link not in links:
            links.append(link)
    return {"lanes": list(lanes.values()), "rows": rows, "links": links}


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
        row = _history_row(event, reached)
        if kind == "start" and rows and (rows[-1]["kind"], rows[-1]["step"]) == ("restore", step):
            rows[-1]["text"] = _join(rows[-1]["text"], row["text"])  # one resume, two events
            continue
        if kind in RETURNS:
            reached = step
        rows.append(row)
    first = next((row for row in rows if row["kind"] == "start"), {"text": ""})
    first["title"] = "started"
    for parent in run.parents[:1]:
        changed = changes_text(parent)
        origin = f"from {parent.get('run') or parent['folder']} at step {parent.get('step')}"
        first["text"] = _join(f"{origin}, with {changed}" if changed else origin, first["text"])
    left = len(rows) - MAX_ROWS
    if left > 0:
        head = MAX_ROWS // 3
        rows[head : head + left] = [_row("fold", rows[head - 1]["step"], f"{left:,} more")]
    return rows


def _history_row(event: Event, reached: int) -> Row:
    kind, step, reason = event["event"], event["step"], event.get("reason")
    title = "finished" if kind == "stop" and reason == "done" else TITLES[kind]
    text = "" if kind == "restore" or reason == "done" else TEXTS[kind](event)  # the titles say it
    lost = max(0, reached - step) if kind in RETURNS else 0
    repeat = f"{lost:,} {'step' if lost == 1 else 'steps'} to repeat" if lost else ""
    return _row(kind, step, title, _join(text, repeat, changes_text(event)), event["time"], lost)


def _fork_row(rows: list[Row], parent: dict[str, Any]) -> Row:
    """Return the row of a fork at the parent's step. A new one stands before later steps, never before the start."""
    step = parent["step"] if isinstance(parent.get("step"), int) else 0
    for row in rows:
        if row["kind"] == "fork" and row["step"] == step:
            return row
    loaded = "weights" if parent.get("with") == "weights" else "weights and optimizer"
    text = f"{loaded} taken from {str(parent.get('sha256', ''))[:12]}; {parent.get('folder')}"
    fork = _row("fork", step, "forked", text)
    later = (i for i, row in enumerate(rows) if row["step"] > step and row["kind"] != "start")
    rows.insert(next(later, len(rows)), fork)
    return fork


def _row(kind: str, step: int, title: str, text: str = "", time: float | None = None, lost: int = 0) -> Row:
    return {"kind": kind, "step": step, "title": title, "text": text, "time": time, "lost": lost}


def _join(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def _key(folder: str) -> str:
    try:
        return str(Path(folder).resolve())
    except (ValueError, OSError, RuntimeError):  # not a path, or a loop of links
        return folder
