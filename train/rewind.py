"""The way back to an earlier checkpoint, or to the beginning: what becomes of later ones, and what is recorded."""

import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from shlex import quote

from minka.checkpoint.catalogue import newest_first, whole_newest_first
from minka.checkpoint.commit import set_aside, step_name
from minka.checkpoint.filesystem import LOCAL
from minka.launch.environment import job_name, requeued
from minka.plan.errors import UserError
from minka.plan.ledger import STEP, Ledger, lines_from_end, parse_event
from minka.plan.read_file import reading
from minka.plan.retention import way_back
from minka.plan.run_folder import RunFolder
from minka.plan.run_state import Position

CURE = "add what cures it (docs/failures.md)"


def go_back_from(folder: RunFolder, refused: int) -> str:
    """Say where the run continues after every step on the weights of step `refused` was refused.

    A newest checkpoint with those weights is renamed if there is an older whole one, which then is the newest.
    """
    whole: list[int] = []
    with suppress(OSError, UserError):  # one of a different run, say: the next start reports it
        whole.extend(islice(whole_newest_first(folder.checkpoints), 2))
    back = way_back(whole, refused)
    if back.step is None:
        return f"nothing was saved: `minka train {quote(str(folder.path))}` begins again; {CURE}"
    command = f"`minka train {quote(f'{folder.path}@{back.step}')}` goes back to step {back.step}; {CURE}"
    if back.set_aside is None:
        only = back.step == refused
        scratch = f"`minka train {quote(str(folder.path))} --from-scratch` begins again"
        note = f"the only whole checkpoint is of the step whose weights were refused ({refused})"
        return f"{note}; {scratch}, and {command}" if only else command
    path = folder.checkpoints / step_name(back.set_aside)
    with suppress(OSError):  # RUN@STEP passes it over all the same
        path = set_aside(LOCAL, path, "refused")
    return f"the checkpoint of step {refused}, whose weights were refused, is kept as {path.name}; {command}"


def return_to(folder: RunFolder, position: Position) -> Path | None:
    """Make the checkpoint at `position` the newest one (RUN@STEP); for the run's one writer.

    Return where the later ones are: those of later steps, and all that a restore would try before it.
    """
    folder.exit_file.unlink(missing_ok=True)
    order = newest_first(folder.checkpoints)
    later = [step for at, step in enumerate(order) if step > position.step or at < order.index(position.step)]
    places = {
        folder.checkpoints: [folder.checkpoints / step_name(step) for step in later],
        folder.evals: [path for path in folder.evals.glob("step-*") if _step(path) > position.step],
    }
    number = next(n for n in count(1) if not any((place / f"old-{n}").exists() for place in places))
    for place, paths in places.items():
        if paths:
            (place / f"old-{number}").mkdir()  # in it, since it may be a link to a different disk
        for path in paths:
            path.rename(place / f"old-{number}" / path.name)
    aside = folder.checkpoints / f"old-{number}" if later else None
    reason = f"`minka train RUN@{position.step}` was given"
    _record(folder, "rewind", position, reason + (f"; the later checkpoints are in {aside}" if aside else ""))
    return aside


def restart(folder: RunFolder) -> Path | None:
    """Set a run back to its beginning (--from-scratch); for its one writer. Return where its checkpoints are."""
    aside, reason, number = None, "--from-scratch was given", _free_number(folder)
    for place in filter(Path.exists, (folder.checkpoints, folder.evals, folder.tensorboard)):
        old = place.rename(place.with_name(f"{place.name}.old-{number}"))
        if place == folder.checkpoints:
            aside = old
            reason += f"; its checkpoints are in {old.name}"
    folder.exit_file.unlink(missing_ok=True)
    _record(folder, "restart", Position(), reason)
    return aside


def repeated(folder: RunFolder, environment: Mapping[str, str]) -> bool:
    """Whether a scheduler repeats a job that has gone back in this run already, and must not discard anything again."""
    if not (requeued(environment) and folder.ledger_bytes()):
        return False
    job = job_name(environment)
    with reading(folder.ledger_file), folder.ledger_file.open("rb") as ledger:
        events = (parse_event(line) for _, line in lines_from_end(ledger, skip=STEP))
        return any(e and e["event"] in ("rewind", "restart") and e.get("job", job) == job for e in events)


def _record(folder: RunFolder, event: str, position: Position, reason: str) -> None:
    ledger = Ledger(folder.ledger_file)
    ledger.append(event, step=position.step, tokens=position.tokens, reason=reason, job=job_name(os.environ))
    ledger.close()


def _free_number(folder: RunFolder) -> int:
    """One that no folder that was moved aside has."""
    return next(n for n in count(1) if not any(folder.path.rglob(f"*.old-{n}")))


def _step(path: Path) -> int:
    """The step of an evaluation's folder; -1 for a different name."""
    name = path.name.removeprefix("step-")
    return int(name) if name.isdecimal() else -1
