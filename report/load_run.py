"""A run's folder as the report sees it: everything is read, nothing is written, and what cannot be read is said."""

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


class Run(NamedTuple):
    """What is on disk of one run. `events` is the whole ledger, `kept` what counts of it (plan/ledger.py)."""

    folder: RunFolder
    events: list[Event]
    kept: list[Event]
    torn: list[int]  # line numbers, from 1
    config: dict[str, object]  # "section.key" -> value, as last started
    planned: RunConfig | None  # None: another version's configuration
    ending: dict[str, Any]  # exit_reason.json, and `written`, when
    provenance: dict[str, Any]
    parents: list[dict[str, Any]]  # of lineage.json, nearest first
    plan: object  # plan.json as it stands, None without one
    evals: list[dict[str, Any]]  # results in evals/, oldest step first
    there: dict[str, int]  # name of each checkpoint on disk -> its step
    notes: list[str]  # what could not be read, for people


def read_run(given: str) -> Run:
    """The run that `given` means: a folder, its run.toml, or a name under runs/. Raises UserError if there is none."""
    path = Path(given)
    folder = find_run(str(path.parent) if path.name == "run.toml" else given)
    notes: list[str] = []
    events, torn = _events(folder.ledger_file, notes)
    ending = _table(folder.exit_file, notes)
    if ending:
        ending["written"] = folder.exit_file.stat().st_mtime
    lineage = _table(folder.path / "lineage.json", notes).get("parents", [])
    parents = [p for p in lineage if isinstance(p, dict)] if isinstance(lineage, list) else []
    return Run(
        folder=folder,
        events=events,
        kept=current(events),
        torn=torn,
        config=_config(folder, events, notes),
        planned=_planned(folder, notes),
        ending=ending,
        provenance=_table(folder.path / "provenance.json", notes),
        parents=parents,
        plan=_json(folder.path / "plan.json", notes),
        evals=list(_evals(folder.evals, notes)),
        there=_checkpoints(folder.checkpoints),
        notes=notes,
    )


def _events(file: Path, notes: list[str]) -> tuple[list[Event], list[int]]:
    """The ledger, and its torn lines."""
    torn: list[int] = []
    try:
        events = list(read_ledger(file, torn.append))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    if not file.exists():
        notes.append(f"{file} is not there: the run has written nothing yet")
    return events, torn


def _config(folder: RunFolder, events: list[Event], notes: list[str]) -> dict[str, object]:
    """As the last `start` tells it, else run.toml: read as plain TOML, so that any version's is shown."""
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
        notes.append(f"what was planned is not known: {error}")
        return None


def _json(file: Path, notes: list[str]) -> object:
    if not file.exists():
        return None
    try:
        return parse(file.read_bytes())
    except (OSError, ValueError) as error:
        notes.append(f"{file} cannot be read: {error}")
        return None


def _table(file: Path, notes: list[str]) -> dict[str, Any]:
    found = _json(file, notes)
    return found if isinstance(found, dict) else {}


def _evals(folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Results of evals/, `suite` made of the file's name when other settings were used (heldout@1-HASH)."""
    for file in sorted(folder.glob("step-*/*.json")):
        result = _table(file, notes)
        if not (is_count(result.get("step")) and isinstance(result.get("scores"), dict)):
            continue
        suite = str(result.get("suite", file.stem))
        yield {**result, "suite": file.stem if "-" in file.stem else suite}


def _checkpoints(folder: Path) -> dict[str, int]:
    found = (path.parent.name for path in sorted(folder.glob("step-*/manifest.json")))
    return {name: int(name[5:]) for name in found if name[5:].isdecimal()}
