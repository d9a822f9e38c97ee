"""The files of a run's folder, read for the report. Nothing is written, and what cannot be read becomes a note."""

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import RETURNS, current, is_count, parse_json, read_ledger
from minka.plan.load_config import flatten
from minka.plan.run_folder import find_run
from minka.plan.scores import caveat_of

Event = dict[str, Any]
MAX_LINES_NAMED = 10
BEFORE_START = RETURNS | {"fallback"}  # what a session may write before its `start`


class RunFiles:
    """What is on disk of the run `given`: a folder, its run.toml, or a name under runs/.

    Raises UserError if there is no such run, or if its ledger cannot be read.
    """

    def __init__(self, given: str) -> None:
        path = Path(given)
        self.folder = find_run(str(path.parent) if path.name == "run.toml" else given)
        self.notes: list[str] = []  # what is missing or damaged, for people
        self.torn_lines: list[int] = []  # of the ledger, from 1
        self.events = self._ledger()  # all of them
        self.kept = current(self.events)  # the events that count (plan/ledger.py)
        self.starts = [event for event in self.events if event["event"] == "start"]
        self.config = self._config()  # "section.key" -> value, as last started
        self.planned: RunConfig | None = None  # None: a configuration of a different version
        with self._noted("the plan of the run is unknown"):
            self.planned = self.folder.config()
        self.exit_reason = self._table(self.folder.exit_file)
        if self.exit_reason:
            self.exit_reason["written"] = self.folder.exit_file.stat().st_mtime
        self.provenance = self._table(self.folder.path / "provenance.json")
        parents = self._table(self.folder.lineage_file).get("parents")
        parents = parents if isinstance(parents, list) else []
        self.parents = [p for p in parents if isinstance(p, dict) and p.get("folder")]  # nearest first
        self.parent_folders = self.folder.parent_folders(self.parents)
        self.plan_file = self._json(self.folder.path / "plan.json")  # None without one
        self.evals = list(self._evals())  # oldest step first
        scored = [*(event for event in self.kept if event["event"] == "eval"), *self.evals]
        self.notes += sorted({f"bits per byte: {but}" for but in map(caveat_of, scored) if but})
        committed = (file.parent.name for file in sorted(self.folder.checkpoints.glob("step-*/manifest.json")))
        self.checkpoints = {name: int(name[5:]) for name in committed if name[5:].isdecimal()}  # name -> step

    def _ledger(self) -> list[Event]:
        file = self.folder.ledger_file
        try:
            events = list(read_ledger(file, self.torn_lines.append))
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
        if not file.exists():
            self.notes.append(f"{file} does not exist: the run has written nothing yet")
        elif not events:
            self.notes.append(f"{file} has no events")
        if count := len(self.torn_lines):
            named = ", ".join(map(str, self.torn_lines[:MAX_LINES_NAMED]))
            more = f" and {count - MAX_LINES_NAMED:,} more" if count > MAX_LINES_NAMED else ""
            lines = f"{'line' if count == 1 else 'lines'} {named}{more}"
            self.notes.append(f"{file}: skipped {lines}, cut off or damaged")
        add_running_seconds(events)
        return events

    def _config(self) -> dict[str, object]:
        """Return the configuration of the last `start`, else run.toml as plain TOML, so that any version works."""
        started = [start["config"] for start in self.starts if isinstance(start.get("config"), dict)]
        if started:
            return flatten(started[-1])
        config: dict[str, object] = {}
        with self._noted(str(self.folder.config_file)):
            config = flatten(tomllib.loads(self.folder.config_file.read_text(encoding="utf-8")))
        return config

    def _evals(self) -> Iterator[dict[str, Any]]:
        """Yield results. `suite` is the file's name (heldout@1-HASH) where it has settings that it does not say."""
        for file in sorted(self.folder.evals.glob("step-*/*.json")):
            result = self._table(file)
            if is_count(result.get("step")) and isinstance(result.get("scores"), dict):
                unknown = "-" in file.stem and not isinstance(result.get("settings"), dict)
                suite = file.stem if unknown else str(result.get("suite", file.stem))
                yield {**result, "suite": suite}

    def _json(self, file: Path) -> object:
        found = None
        with self._noted(f"{file} cannot be read"):
            found = parse_json(file.read_bytes()) if file.exists() else None
        return found

    def _table(self, file: Path) -> dict[str, Any]:
        found = self._json(file)
        return found if isinstance(found, dict) else {}

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RecursionError, UserError) as error:
            self.notes.append(f"{what}: {error}")


def add_running_seconds(events: Sequence[Event]) -> None:
    """Give each event `running_seconds`: since the run began, without the pauses between its sessions."""
    begins = set()  # index of each session's first event: its `start`, or what it wrote right before
    for i, event in enumerate(events):
        if event["event"] == "start":
            while i and events[i - 1]["event"] in BEFORE_START:
                i -= 1
            begins.add(i)
    paused = 0.0
    for i, event in enumerate(events):
        if i and i in begins:
            paused += max(0.0, event["time"] - events[i - 1]["time"])
        event["running_seconds"] = max(0.0, event["time"] - events[0]["time"] - paused)
