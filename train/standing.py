"""Where a run stands, by what lies in its folder, and whether it may go on from there. Imports no torch."""

from pathlib import Path

from minka.checkpoint.catalogue import newest_first, steps_of
from minka.checkpoint.commit import step_name
from minka.checkpoint.manifest import read_header
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import Ledger
from minka.plan.resume_rules import changes, check_batch, check_length, decides_rate
from minka.plan.run_folder import RunFolder
from minka.train.parent_run import Position, hash_hub_folder, pinned_parent


def standing(folder: RunFolder) -> Position | None:
    """Where the run stands: its newest checkpoint whose manifest can be read; None when there is none."""
    for step in newest_first(folder.checkpoints):
        try:
            return Position.of(read_header(folder.checkpoints / step_name(step)).state)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # restore will say what is wrong with it
    return None


def check_goes_on(folder: RunFolder, config: RunConfig) -> None:
    """Refuse to begin from nothing where there is history, and a length that lies behind the run. Raises UserError."""
    history = folder.history()
    if history.saves and not steps_of(folder.checkpoints):
        raise UserError(
            "this run has saved checkpoints, and none of them is there",
            where=str(folder.checkpoints),
            why="it would begin again from nothing, and what was paid for would be lost without a word",
            remedy=f"put them back; or, if that is what you want, `minka train {folder.path} --from-scratch`",
            status=ExitStatus.NEEDS_PERSON,
        )
    place, old = standing(folder), history.config or folder.config()
    if place is not None:
        changed = changes(old, config)
        check_length(changed, config, place.step, place.tokens)
        if decides_rate(changed):
            check_batch(old, config, place.step, place.tokens)
    elif history.starts:
        parent = pinned_parent(folder)
        if parent and not parent.run and hash_hub_folder(parent.folder) != parent.sha256:
            raise UserError(
                "the weights that this run starts from are others by now",
                where=str(parent.folder),
                remedy="put the folder back as it was, or start a run of another name (run.name=...)",
            )


def begin_again(folder: RunFolder) -> Path | None:
    """Set a run back to its beginning, as a person asked: where its checkpoints have been moved, if there were any.

    For the run's one writer.
    """
    aside = None
    if folder.checkpoints.exists():
        taken = {path.name for path in folder.path.glob("checkpoints.old-*")}
        number = next(n for n in range(1, len(taken) + 2) if f"checkpoints.old-{n}" not in taken)
        aside = folder.checkpoints.rename(folder.path / f"checkpoints.old-{number}")
        if folder.evals.exists():
            folder.evals.rename(folder.path / f"evals.old-{number}")
    folder.exit_file.unlink(missing_ok=True)
    ledger = Ledger(folder.ledger_file)
    where = f"; its checkpoints lie in {aside.name}" if aside else ""
    ledger.append("restart", step=0, tokens=0, reason=f"--from-scratch was given{where}")
    ledger.close()
    return aside
