"""Whether a run may start as it was asked to, and from where: what `minka train` and its dry run check. No torch."""

from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

from minka.checkpoint.catalogue import steps_of
from minka.checkpoint.commit import step_name
from minka.checkpoint.manifest import read_header
from minka.launch.supervisor import Job
from minka.plan.checkpoint_disk import check_mounted, find_place
from minka.plan.cli import print_json
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import Ledger
from minka.plan.resume_rules import LENGTH, Decision, decide
from minka.plan.run_folder import RunFolder
from minka.plan.run_state import Position, RunState, read_run_state
from minka.train.parent_run import Parent, check_parent, check_tokenizer, find_parent, hash_hub_folder, pinned_parent


class Outlook(NamedTuple):
    """What starting the run would do."""

    state: RunState  # as it is now
    decision: Decision
    parent: Parent | None = None  # of a new run
    from_scratch: bool = False  # a run that has begun restarts at step 0
    export_is_missing: bool = False  # of a run that is over

    @property
    def step(self) -> int:
        """The step it would resume from; 0 for its beginning."""
        return self.state.position.step if self.state.position and not self.from_scratch else 0

    def describe(self) -> str:
        """The same in one line."""
        if self.from_scratch:
            return "restarts at step 0; its checkpoints would be moved aside"
        if self.decision.over:
            at = f"is finished, at step {self.step:,}" if self.state.position else "is finished"
            at += f"; it becomes longer only by {' '.join(self.decision.longer)}" if self.decision.longer else ""
            return f"{at}; its export is missing and would be written" if self.export_is_missing else at
        if self.state.position:
            return f"resumes from step {self.step:,}"
        if self.state.begun:
            return "restarts from its beginning: it has no checkpoint that can be read"
        return f"begins from {self.parent.name}" if self.parent else "begins from new weights"


def read_state(folder: RunFolder) -> RunState:
    """The state of the run in `folder`."""
    return read_run_state(folder, steps_of(folder.checkpoints), partial(_header, folder.checkpoints))


def saved_step(folder: RunFolder) -> int | None:
    """The step that the run would resume from, for a message; None where nothing is saved, or nothing can be read."""
    with suppress(UserError, OSError):
        position = read_state(folder).position
        return position.step if position else None
    return None


def read_and_check(job: Job) -> Outlook:
    """`check_start` of the run as it is now; it must also have no STOP file and no process that trains it."""
    folder = RunFolder.of(job.config)
    outlook = check_start(job, read_state(folder))
    if folder.path.is_dir() and not outlook.decision.over:
        folder.check_may_start()
    return outlook


def check_start(job: Job, state: RunState) -> Outlook:
    """What starting the run would do. Raises UserError where it may not start, or not like this."""
    config, from_scratch, folder = job.config, job.from_scratch, RunFolder.of(job.config)
    if not state.begun:
        folder.check_free()
        find_place(config)
        parent = find_parent(config)
        if parent:
            check_parent(parent, config)
            check_tokenizer(parent, config)
        return Outlook(state, Decision(False, {}), parent)
    if not state.finished:
        check_mounted(folder.checkpoints)
    if state.config and config.run.start_from != state.config.run.start_from:
        find_parent(config)  # it may be this very run, which has an error message of its own
    decision = decide_start(job, state)
    if state.started and not state.position and not decision.over and not from_scratch:
        parent = pinned_parent(folder)
        if parent and not parent.run and hash_hub_folder(parent.folder) != parent.sha256:
            what = "the weights that this run starts from have changed since it was created"
            remedy = "restore the folder, or start a run of a different name (run.name=...)"
            raise UserError(what, where=str(parent.folder), remedy=remedy)
    missing = decision.over and export_is_missing(config, state)
    return Outlook(state, decision, from_scratch=from_scratch, export_is_missing=missing)


def decide_start(job: Job, state: RunState) -> Decision:
    """`decide` for the run of `job`."""
    where = str(RunFolder.of(job.config).path)
    return decide(state, job.config, where, given=job.given, from_scratch=job.from_scratch)


def export_is_missing(config: RunConfig, state: RunState) -> bool:
    """Whether a run that is over lacks the export of its last checkpoint, which checkpoint.export asks for."""
    if not (config.checkpoint.export and state.position):
        return False
    folder, name = RunFolder.of(config), step_name(state.position.step)
    with suppress(OSError, ValueError):
        return not folder.is_exported(name, read_header(folder.checkpoints / name).sha256)
    return False


def print_missing_export(folder: RunFolder, *, as_json: bool) -> None:
    """Say that a finished run is exported now."""
    if not as_json:
        print(f"{folder.path} is finished, but {folder.export} is not of its last checkpoint: writing it", flush=True)


def print_finished(folder: RunFolder, decision: Decision, *, as_json: bool) -> None:
    """Say that a run is over, which changes have no effect on it, and how it gets as long as the named file says."""
    export = str(folder.export) if folder.export.is_dir() else None
    if as_json:
        found = {"run": str(folder.path), "status": 0, "finished": True, "export": export}
        print_json({**found, "longer": list(decision.longer)})
        return
    print(
        f"{folder.path} is finished. {f'Its export: {export}. ' if export else ''}To train it further, make it longer "
        "(run.max_steps=...); a new run needs a name (run.name=...)"
    )
    if decision.longer:
        lengths = {key: decision.changed[key][0] for key in LENGTH if key in decision.changed}
        ended, longer = next(f"{key}={value}" for key, value in lengths.items() if value), " ".join(decision.longer)
        print(f"It ended at {ended}; to make it as long as the file says: `minka train {folder.path} {longer}`")
    if decision.ignored:
        print(f"Without more steps, {', '.join(decision.ignored)} changes nothing in it.")


def restart(folder: RunFolder) -> Path | None:
    """Set a run back to its beginning (--from-scratch); for its one writer. Return where its checkpoints are."""
    aside, reason = None, "--from-scratch was given"
    places = (folder.checkpoints, folder.evals, folder.tensorboard)
    number = next(n for n in count(1) if not any(place.with_name(f"{place.name}.old-{n}").exists() for place in places))
    for place in filter(Path.exists, places):
        old = place.rename(place.with_name(f"{place.name}.old-{number}"))
        if place == folder.checkpoints:
            aside = old
            reason += f"; its checkpoints are in {old.name}"
    folder.exit_file.unlink(missing_ok=True)
    ledger = Ledger(folder.ledger_file)
    ledger.append("restart", step=0, tokens=0, reason=reason)
    ledger.close()
    return aside


def _header(checkpoints: Path, step: int) -> tuple[int, Position] | None:
    try:
        header = read_header(checkpoints / step_name(step))
        return header.number, Position.of(header.state)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the restore reports what is wrong with it
