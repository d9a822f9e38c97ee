"""Where runs come from and how they went on, as a graph: lanes (runs), rows (what happened), links (forks)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minka.report.events import changes
from minka.report.load_run import Event, Run

MOST_ROWS = 24  # of one run; of more, the middle is folded into one row
TELLING = frozenset({"start", "restore", "fallback", "rewind", "restart", "stop"})
Row = dict[str, Any]


class Graph:
    """Filled run by run. Ancestors stand above the runs that come from them; a fork is a link between two rows."""

    def __init__(self) -> None:
        self.lanes: list[dict[str, Any]] = []
        self._rows: dict[str, list[Row]] = {}  # by lane, in the order of the lanes
        self._forks: list[tuple[str, int, str]] = []  # parent's lane, step, child's lane

    def add(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        """All runs of a page; call it once."""
        own = {_key(str(run.folder.path)): index for index, run in enumerate(runs)}
        for run in sorted(runs, key=lambda run: len(run.parents)):
            child = _key(str(run.folder.path))
            chain = [parent for parent in run.parents if parent.get("folder")]
            for parent in reversed(chain):
                folder = str(parent["folder"])
                self._lane(_key(folder), str(parent.get("run") or Path(folder).name), None, [])
            for parent in chain:
                self._fork(_key(str(parent["folder"])), parent, child)
                child = _key(str(parent["folder"]))
        for run, name in sorted(zip(runs, names, strict=True), key=lambda pair: len(pair[0].parents)):
            key = _key(str(run.folder.path))
            self._lane(key, name, own[key], rows_of(run))

    def as_json(self) -> dict[str, Any]:
        """{"lanes", "rows", "links": [[from row, to row]]}; rows of a lane stand together, parents first."""
        rows: list[Row] = []
        for lane, here in enumerate(self._rows.values()):
            rows += [{**row, "lane": lane} for row in here]
        order = list(self._rows)
        links = []
        for parent, step, child in self._forks:
            begin = next((i for i, row in enumerate(rows) if row["lane"] == order.index(parent) and _is(row, step)), -1)
            end = next((i for i, row in enumerate(rows) if row["lane"] == order.index(child)), -1)
            if -1 < begin < end:
                links.append([begin, end])
        return {"lanes": self.lanes, "rows": rows, "links": links}

    def _lane(self, key: str, name: str, run: int | None, rows: list[Row]) -> None:
        forks = [row for row in self._rows.pop(key, []) if row["kind"] == "fork"]
        if key not in [lane["key"] for lane in self.lanes]:
            self.lanes.append({"key": key, "name": name, "run": run})
        else:  # met as a parent first: now it is known in full
            self.lanes = [lane for lane in self.lanes if lane["key"] != key] + [{"key": key, "name": name, "run": run}]
        for fork in forks:
            _insert(rows, fork)
        self._rows[key] = rows

    def _fork(self, parent: str, told: dict[str, Any], child: str) -> None:
        step = told.get("step")
        step = step if isinstance(step, int) else 0
        if (parent, step, child) in self._forks:
            return
        self._forks.append((parent, step, child))
        rows = self._rows.setdefault(parent, [])
        if not any(_is(row, step) for row in rows):
            how = "weights" if told.get("with") == "weights" else "weights and optimizer"
            text = f"{how} taken from {str(told.get('sha256', ''))[:12]}; {told.get('folder')}"
            _insert(rows, {"kind": "fork", "step": step, "title": "forked", "text": text, "time": None})


def rows_of(run: Run) -> list[Row]:
    """What happened to one run, a row each: begun, resumed, fallen back, ended."""
    rows: list[Row] = []
    reached = 0
    for event in run.events:
        if event["event"] == "step":
            reached = max(reached, event["step"])
        if event["event"] not in TELLING:
            continue
        row = _row(event, reached, first=not any(r["kind"] == "start" for r in rows))
        if event["event"] == "start" and rows and rows[-1]["kind"] == "restore" and rows[-1]["step"] == row["step"]:
            rows[-1]["text"] = "; ".join(filter(None, [rows[-1]["text"], row["text"]]))  # one coming back, two events
            continue
        if event["event"] in ("restore", "rewind", "restart"):
            reached = event["step"]
        rows.append(row)
    if rows and rows[0]["kind"] == "start":
        rows[0]["text"] = "; ".join(filter(None, [_origin(run), rows[0]["text"]]))
    return _folded(rows)


def _row(event: Event, reached: int, *, first: bool) -> Row:
    kind, step = event["event"], event["step"]
    words, text = [changes(event)], str(event.get("reason", ""))
    lost = max(0, reached - step) if kind in ("restore", "rewind", "restart") else 0
    if kind == "start":
        ranks = event.get("ranks", "?")
        where = f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {event.get('device', '?')}"
        title, words = "begun" if first else "started", [where, *words]
    elif kind == "stop":
        title, text = ("finished", "") if text == "done" else ("ended", text)
    elif kind == "fallback":
        title = "checkpoint passed over"
        text = f"{Path(str(event.get('path', ''))).name}: {text}"
    else:
        title = {"restore": "resumed", "rewind": "gone back", "restart": "begun again"}[kind]
        words.append(f"{lost:,} {'step' if lost == 1 else 'steps'} to be done again" if lost else "")
        text = "" if text == "the run is going on" else text
    shown = "; ".join(filter(None, [text, *words]))
    return {"kind": kind, "step": step, "title": title, "text": shown, "time": event["time"], "lost": lost}


def _origin(run: Run) -> str:
    if not run.parents:
        return ""
    parent = run.parents[0]
    given = parent.get("changed")
    changed = changes({"changed": given}) if isinstance(given, dict) else ""
    name = parent.get("run") or parent.get("folder")
    return f"from {name} at step {parent.get('step')}" + (f", with {changed}" if changed else "")


def _folded(rows: list[Row]) -> list[Row]:
    if len(rows) <= MOST_ROWS:
        return rows
    head, tail = rows[: MOST_ROWS // 3], rows[-(MOST_ROWS - MOST_ROWS // 3) :]
    left = len(rows) - len(head) - len(tail)
    fold = {"kind": "fold", "step": head[-1]["step"], "title": f"{left:,} more", "text": "", "time": None, "lost": 0}
    return [*head, fold, *tail]


def _insert(rows: list[Row], fork: Row) -> None:
    """Before the first row of a later step; never before the run's beginning."""
    later = (i for i, row in enumerate(rows) if row["step"] > fork["step"] and row["kind"] != "start")
    rows.insert(next(later, len(rows)), fork)


def _is(row: Row, step: int) -> bool:
    return bool(row["kind"] == "fork" and row["step"] == step)


def _key(folder: str) -> str:
    try:
        return str(Path(folder).resolve())
    except (ValueError, OSError, RuntimeError):  # no path at all, or a circle of links
        return folder
