"""Whether a run may start as it was asked to, and from where: what `minka train` and its dry run check. No torch."""

from contextlib import suppress
from functools import partial
from shlex import quote
from typing import NamedTuple

from minka.checkpoint.catalogue import find_checkpoint, steps_of, whole_newest_first
from minka.checkpoint.commit import step_name
from minka.checkpoint.manifest import read_header
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.launch.supervisor import Job
from minka.plan.checkpoint_disk import check_place, find_place
from minka.plan.checkpoint_owner import check_own
from minka.plan.cli import print_json
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.read_file import MALFORMED, reading
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
    returns_to: Position | None = None  # it goes back to this checkpoint

    @property
    def step(self) -> int:
        """The step it would resume from; 0 for its beginning."""
        position = self.returns_to or self.state.position
        return position.step if position and not self.from_scratch else 0

    def describe(self) -> str:
        """The same in one line."""
        if self.from_scratch:
            return "restarts at step 0; its checkpoints would be moved aside"
        if self.returns_to and not self.decision.over:
            later = ", ".join(str(step) for step in self.state.checkpoints if step > self.step)
            aside = f"; its later checkpoints ({later}) would be moved aside" if later else ""
            return f"goes back to step {self.step:,}{aside}"
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
    """The state of the run in `folder`. Raises UserError for a checkpoint of a different run that decides it."""
    return read_run_state(folder, steps_of(folder.checkpoints), partial(_header, folder))


def saved_step(folder: RunFolder) -> int | None:
    """The step that the run would resume from, for a message; None where nothing is saved, or nothing can be read."""
    with suppress(UserError, OSError):
        return next(whole_newest_first(folder.checkpoints), None)
    return None


def newest_whole(outlook: Outlook, folder: RunFolder) -> Outlook:
    """`outlook` with the step that a restore would take: not one whose files are cut or missing. Raises UserError."""
    if not outlook.state.checkpoints or outlook.decision.over or outlook.from_scratch or outlook.returns_to:
        return outlook
    step = next(whole_newest_first(folder.checkpoints), None)
    if step is None:
        remedy = "`minka train RUN` says why; `minka train RUN --from-scratch` starts again at step 0"
        status = ExitStatus.NEEDS_PERSON
        raise UserError("none of the checkpoints is whole", where=str(folder.checkpoints), remedy=remedy, status=status)
    return outlook._replace(state=outlook.state.model_copy(update={"position": position_of(folder, step)}))


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
        if job.return_to is not None:
            what = f"the run has not begun, so it has no step {job.return_to} to go back to"
            remedy = "leave @STEP out; a new run begins from a different one with run.start_from=RUN@STEP"
            raise UserError(what, where=str(folder.path), remedy=remedy)
        folder.check_free()
        find_place(config)
        parent = find_parent(config)
        if parent:
            check_parent(parent, config, job.given)
            check_tokenizer(parent, config)
        return Outlook(state, Decision(False, {}), parent)
    if not state.finished:
        check_place(folder)
    if state.config and config.run.start_from != state.config.run.start_from:
        find_parent(config)  # it may be this very run, which has an error message of its own
    decision = decide_start(job, state)
    if not decision.over:  # a finished run that restarts or becomes longer
        check_place(folder)
    if from_scratch:
        find_place(config, again=True)
    if job.return_to is not None:
        position = position_of(folder, job.return_to)
        return Outlook(state, decision, returns_to=position)
    if not decision.over and (from_scratch or not state.position):
        parent = pinned_parent(folder)
        if parent and not parent.run and hash_hub_folder(parent.folder) != parent.sha256:
            what = "the weights that this run starts from have changed since it was created"
            remedy = "restore the folder, or start a run of a different name (run.name=...)"
            raise UserError(what, where=str(parent.folder), remedy=remedy)
    missing = decision.over and export_is_missing(config, state)
    return Outlook(state, decision, from_scratch=from_scratch, export_is_missing=missing)


def decide_start(job: Job, state: RunState) -> Decision:
    """`decide` for the run of `job`, after the return to an earlier step that it asks for."""
    folder = RunFolder.of(job.config)
    if job.return_to is not None:
        state = state.returned(position_of(folder, job.return_to))
    return decide(state, job.config, str(folder.path), given=job.given, from_scratch=job.from_scratch)


def position_of(folder: RunFolder, step: int) -> Position:
    """The position of the checkpoint of `step`. Raises UserError where there is none, naming those there are."""
    path = find_checkpoint(folder.checkpoints, str(step))
    remedy = "go back to a different step: `minka train RUN@STEP`"
    with reading(path, "", *MALFORMED, remedy=remedy):
        StoredCheckpoint(path).check_files()
        return Position.of(read_header(path).state)


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
        command = f"minka train {quote(str(folder.path))} {longer}"
        print(f"It ended at {ended}; to make it as long as the file says: `{command}`")
    if decision.ignored:
        print(f"Without more steps, {', '.join(decision.ignored)} changes nothing in it.")


def _header(folder: RunFolder, step: int) -> tuple[int, Position] | None:
    path = folder.checkpoints / step_name(step)
    try:
        header = read_header(path)
        check_own(folder, path, header.state)
        return header.number, Position.of(header.state)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the restore reports what is wrong with it
