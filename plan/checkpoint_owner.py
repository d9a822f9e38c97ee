"""Whether a checkpoint is of the run in whose folder it lies: what its manifest says of its run is compared."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.resume_rules import changes, describe_changes, rule_of
from minka.plan.run_folder import RunFolder

PLACES = ("data.store", "data.paths", "run.start_from", "run.start_with")  # may be written in a different way


def check_own(folder: RunFolder, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Raises UserError where `checkpoint`, with the state `saved` in its manifest, is of a different run.

    Or where provenance.json, which has the id of this one, is missing or damaged.
    """
    if saved.get("run_id") and not folder.provenance():
        why = "it has the run's id, by which its checkpoints are known"
        remedy = "put the file back, from a copy of the run's folder"
        raise UserError("missing or damaged", where=str(folder.provenance_file), why=why, remedy=remedy)
    why = difference_of_runs(folder, saved)
    if not why:
        return
    run = (saved.get("config") or {}).get("run", {})
    theirs = str(Path(str(run.get("folder", ""))) / str(run.get("name", ""))) if run else "one of an older version"
    new = f"start a new run from it (run.name=NEW run.start_from={theirs}@{saved.get('step')})" if run else ""
    remedy = f"move it out of {folder.checkpoints}" + (f"; to train on from it, {new}" if new else "")
    raise UserError(f"this checkpoint is of a different run: {theirs}", where=str(checkpoint), why=why, remedy=remedy)


def difference_of_runs(folder: RunFolder, saved: Mapping[str, Any]) -> str:
    """What shows that a checkpoint is of a different run; empty where nothing does. Older versions wrote no id."""
    began = folder.provenance()
    if not isinstance(began.get("data"), dict):
        return ""  # damaged: whoever needs it says so
    if saved.get("run_id"):
        here = str(began.get("id", ""))
        return "" if saved["run_id"] == here else f"its run has the id {saved['run_id']}, and this one {here or 'none'}"
    data = began["data"].get("manifest_sha256")
    if data and saved.get("data_sha256", data) != data:
        return f"it was trained on a different token store (hash {str(saved['data_sha256'])[:8]}, not {data[:8]})"
    changed = {}
    with suppress(UserError, ValidationError, KeyError):
        changed = changes(folder.config(), RunConfig.model_validate_json(json.dumps(saved["config"])))
    lines = describe_changes({k: v for k, v in changed.items() if rule_of(k).resume == "refused" and k not in PLACES})
    return f"it was trained with different settings: {'; '.join(lines)}" if lines else ""
