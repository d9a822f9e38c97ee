"""The files of a run's folder, read for the report. Nothing is written, and what cannot be read becomes a note."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import current, is_count, parse, read_ledger
from minka.plan.load_config import flatten
from minka.plan.run_folder import RunFolder, find_run

Event = dict[str, Any]
MAX_LINES_NAMED = 10


class RunFiles(NamedTuple):
    """What is on disk of one run. `events` is the whole ledger, `kept` the events that count (plan/ledger.py)."""

    folder: RunFolder
    events: list[Event]
    kept: list[Event]
    torn_lines: list[int]  # line numbers, from 1
    config: dict[str, object]  # "section.key" -> value, as last started
    planned: RunConfig | None  # None: a configuration of a different version
    exit_reason: dict[str, Any]  # exit_reason.json, and `written`: its time
    provenance: dict[str, Any]
    parents: list[dict[str, Any]]  # of lineage.json, nearest first
    plan_file: object  # content of plan.json, None without one
    evals: list[dict[str, Any]]  # results in evals/, oldest step first
    checkpoints: dict[str, int]  # name of each checkpoint on disk -> its step
    notes: list[str]  # what could not be read, for people

    def warnings(self) -> list[str]:
        """Return what is wrong with the files, one line each."""
        count = len(self.torn_lines)
        if not count:
            return self.notes
        named = ", ".join(map(str, self.torn_lines[:MAX_LINES_NAMED]))
        more = f" and {count - MAX_LINES_NAMED:,} more" if count > MAX_LINES_NAMED else ""
        lines = f"{'line' if count == 1 else 'lines'} {named}{more}"
        return [f"{self.folder.ledger_file}: skipped {lines}, cut off or damaged", *self.notes]


def read_run_files(given: str) -> RunFiles:
    """Read the run `given`: a folder, its run.toml, or a name under runs/. Raises UserError if it does not exist."""
    path = Path(given)
    folder = find_run(str(path.parent) if path.name == "run.toml" else given)
    notes: list[str] = []
    events, torn_lines = _ledger(folder.ledger_file, notes)
    exit_reason = _read_table(folder.exit_file, notes)
    if exit_reason:
        exit_reason["written"] = folder.exit_file.stat().st_mtime
    parents = _read_table(folder.path / "lineage.json", notes).get("parents", [])
    committed = (path.parent.name for path in sorted(folder.checkpoints.glob("step-*/manifest.json")))
    return RunFiles(
        folder=folder,
        events=events,
        kept=current(events),
        torn_lines=torn_lines,
        config=_config(folder, events, notes),
        planned=_planned(folder, notes),
        exit_reason=exit_reason,
        provenance=_read_table(folder.path / "provenance.json", notes),
        parents=[p for p in parents if isinstance(p, dict)] if isinstance(parents, list) else [],
        plan_file=_read_json(folder.path / "plan.json", notes),
        evals=list(_evals(folder.evals, notes)),
        checkpoints={name: int(name[5:]) for name in committed if name[5:].isdecimal()},
        notes=notes,
    )


def _ledger(file: Path, notes: list[str]) -> tuple[list[Event], list[int]]:
    torn_lines: list[int] = []
    try:
        events = list(read_ledger(file, torn_lines.append))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if not file.exists():
        notes.append(f"{file} does not exist: the run has written nothing yet")
    return events, torn_lines


def _config(folder: RunFolder, events: list[Event], notes: list[str]) -> dict[str, object]:
    """Return the configuration of the last `start`, else of run.toml: read as plain TOML, so that any version works."""
    started = [e["config"] for e in events if e["event"] == "start" and isinstance(e.get("config"), dict)]
    if started:
        return flatten(started[-1])
    try:
        return flatten(tomllib.loads(folder.config_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{folder.config_file}: {error}")
        return {}


def _planned(folder: RunFolder, notes: list[str]) -> RunConfig | None:
    try:
        return folder.config()
    except (UserError, RecursionError) as error:
        notes.append(f"the plan of the run is unknown: {error}")
        return None


def _read_json(file: Path, notes: list[str]) -> object:
    if not file.exists():
        return None
    try:
        return parse(file.read_bytes())
    except (OSError, ValueError) as error:
        notes.append(f"{file} cannot be read: {error}")
        return None


def _read_table(file: Path, notes: list[str]) -> dict[str, Any]:
    found = _read_json(file, notes)
    return found if isinstance(found, dict) else {}


def _evals(folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield results. `suite` is the file's name where the settings were not the run's (heldout@1-HASH)."""
    for file in sorted(folder.glob("step-*/*.json")):
        result = _read_table(file, notes)
        if is_count(result.get("step")) and isinstance(result.get("scores"), dict):
            suite = file.stem if "-" in file.stem else str(result.get("suite", file.stem))
            yield {**result, "suite": suite}
