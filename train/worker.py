"""One rank, from its environment to its exit status: claim the run, restore it, train, export."""

import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from minka.checkpoint.catalogue import steps_of
from minka.checkpoint.commit import step_name
from minka.checkpoint.export import export_checkpoint
from minka.data.loader import Loader
from minka.data.prepare import store_folder
from minka.data.token_store import TokenStore
from minka.launch.environment import visible_gpus
from minka.launch.exit_reason_file import refusals_recorded, stopped_under_this_agent, write_exit_reason
from minka.launch.supervisor import Job
from minka.launch.supervisor_link import SupervisorLink
from minka.parallel.mesh import Mesh, start_mesh
from minka.plan.checkpoint_disk import claim_place, link_place, renew_claim
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import counted
from minka.plan.read_file import first_line
from minka.plan.resume_rules import Changes, Decision
from minka.plan.run_folder import RunFolder, store_of
from minka.plan.run_state import RunState
from minka.train.announce import announce
from minka.train.build_engine import build_engine
from minka.train.due import evaluation_missed
from minka.train.final_summary import summarise
from minka.train.loop import Session, TrainingEnd, train
from minka.train.parent_run import create_run, open_run, pinned_parent
from minka.train.profiler import Profile
from minka.train.recorder import Recorder
from minka.train.restore_or_init import agreed, restore_or_init
from minka.train.rewind import restart, return_to
from minka.train.start_or_resume import (
    check_start,
    decide_start,
    export_is_missing,
    position_of,
    print_finished,
    print_missing_export,
    read_state,
)
from minka.train.state import State

GROUP_SECONDS = 300.0  # beyond guard.hang_seconds, until the process group times out
SUPERVISED_SECONDS = 86_400.0  # the same where a supervisor sees a hang: ranks may have been suspended for hours
STORE_SECONDS = 60.0  # until a network file system shows a new folder on every host


def work(job: Job) -> int:
    """Train this rank's part of the run; the exit status."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    config, known = job.config, job.state
    config.check(int(os.environ.get("WORLD_SIZE", "1")))

    def prepare() -> None:
        nonlocal known
        known = _prepare(job)

    beyond = SUPERVISED_SECONDS
    if job.heartbeat_pipe is None:
        beyond = GROUP_SECONDS
        check_gpus(visible_gpus(os.environ))
    with (
        start_mesh(
            config.layout,
            casts=config.optimizer.weights == "bf16",
            timeout_seconds=config.guard.hang_seconds + beyond,
            prepare=None if known else prepare,
        ) as mesh,
        refusals_recorded(RunFolder.of(config), writes=mesh.is_first),
        ExitStack() as stack,
    ):
        claim: tuple[RunState, Changes] | None = RunState(), {}
        with agreed(mesh):
            if known and mesh.is_first:
                claim = _claim_run(job, known, stack)
        (over,) = mesh.sum_on_host([claim is None])
        if claim is None or over:
            if mesh.is_first:
                _say_finished(job)
            return int(ExitStatus.DONE)
        run, state = _start_session(job, mesh, stack, *claim)
        end = train(run, state)
        run.profile.close()
        run.record.console.end()
        mesh.barrier()  # every rank has written its files
        run.supervisor.heartbeat(end.state.step, done=True)
        return int(_finish(job, run, end) if mesh.is_first else end.status)


def check_gpus(gpus: int) -> None:
    """Raise UserError where this machine has GPUs that torch cannot use: training on its CPUs is not what was meant."""
    if not gpus or torch.cuda.is_available():
        return
    why = f"this torch ({torch.__version__}) is built without CUDA"
    if torch.version.cuda:
        try:
            torch.cuda.init()
            why = "it sees none"
        except (RuntimeError, AssertionError) as error:
            why = first_line(error)
    remedy = "install a torch that fits the driver, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    raise UserError(f"this machine has {counted(gpus, 'GPU')}, which torch cannot use", why=why, remedy=remedy)


def _prepare(job: Job) -> RunState:
    """Check the run and make its data and folder ready, where torchrun or Slurm started the ranks."""
    folder = RunFolder.of(job.config)
    stopped = stopped_under_this_agent(folder)
    if stopped:
        why = "torchrun starts ranks again that have stopped on purpose (--max-restarts)"
        raise UserError("this job has stopped already", where=str(folder.exit_file), why=why, status=stopped)
    with refusals_recorded(folder):
        state = read_state(folder)
        if not (state.begun and check_start(job, state).decision.over):
            open_run(job.config, job.given)
    return state


def _claim_run(job: Job, state: RunState, stack: ExitStack) -> tuple[RunState, Changes] | None:
    """Take the run's lock, and create or restart it. Return its state and what has changed, or None if it is over."""
    folder, decision = RunFolder.of(job.config), _decide(job, state)
    if decision.over:
        return None
    folder.check_may_start()
    stack.enter_context(folder.only_writer())
    folder.delete_leftovers()
    renew_claim(folder)
    if not state.is_current(folder, steps_of(folder.checkpoints)):  # a different process has trained it meanwhile
        state = read_state(folder)
        check_start(job, state)
        decision = _decide(job, state)
        if decision.over:
            return None
        open_run(job.config, job.given)
    if not state.begun:  # only now: of two first starts at once, the second must not overwrite the other's files
        stack.enter_context(folder.discarded_if_refused())
        create_run(job.config, job.command)
    aside = None
    if job.from_scratch and state.begun:  # last: a refusal must leave everything as it was
        pinned_parent(folder)
        place = claim_place(job.config, again=True)
        aside = restart(folder)
        link_place(job.config, place)
        state = state.restarted()
    elif job.return_to is not None:
        aside = return_to(folder, position_of(folder, job.return_to))
        state = read_state(folder)
    if aside and not job.as_json:
        print(f"the old checkpoints are now in {aside}", flush=True)
    if not os.path.lexists(folder.checkpoints):
        link_place(job.config, claim_place(job.config))
    return state, decision.changed


def _decide(job: Job, state: RunState) -> Decision:
    return decide_start(job, state) if state.begun else Decision(False, {})


def _say_finished(job: Job) -> None:
    """Say that the run is over, once its export is complete."""
    folder = RunFolder.of(job.config)
    state = read_state(folder)
    if export_is_missing(job.config, state):
        print_missing_export(folder, as_json=job.as_json)
        complete_export(job.config)
    print_finished(folder, _decide(job, state), as_json=job.as_json)


def complete_export(config: RunConfig) -> None:
    """Write the export that a finished run lacks, because it was cut off or deleted. Raises UserError."""
    folder = RunFolder.of(config)
    with folder.only_writer():
        folder.delete_leftovers()
        state = read_state(folder)
        if state.position and export_is_missing(config, state):
            checkpoint, store = folder.checkpoints / step_name(state.position.step), store_of(folder)
            export_checkpoint(checkpoint, folder.export, config.model, store.tokenizer, store.eod)


def _start_session(job: Job, mesh: Mesh, stack: ExitStack, before: RunState, changed: Changes) -> tuple[Session, State]:
    """Everything that a rank trains with, and the state to train from. `stack` closes all of it. Collective."""
    config, folder = job.config, RunFolder.of(job.config)
    with agreed(mesh):
        store = _open_store(store_folder(config, Path()), mesh)
    number = int(store.hash[:12], 16)
    (first,) = mesh.sum_on_host([number if mesh.is_first else 0])
    with agreed(mesh):
        if number != first:  # of node-local copies, say
            what = f"on {socket.gethostname()}, the host of rank {mesh.rank}, this is not the store of the first rank"
            remedy = "copy the first rank's host's, or put data.store on a file system that all hosts share"
            raise UserError(what, where=str(store.folder), why="their manifest.json differ", remedy=remedy)
    stacks = folder.logs / f"stacks-{mesh.rank:05d}.txt"
    launcher = job.supervisor if job.heartbeat_pipe is None else None
    supervisor = SupervisorLink(mesh.rank, folder.stop_file, job.heartbeat_pipe, stacks, launcher)
    stack.callback(supervisor.close)
    supervisor.heartbeat(0)
    with agreed(mesh):
        record = Recorder(config, mesh, store, supervisor, as_json=job.as_json)
        stack.callback(record.close)
        if mesh.is_first:
            record.check_held_out()
    engine, optimizer = build_engine(config, mesh)
    state = restore_or_init(engine, record, mesh, before)
    with agreed(mesh):
        if mesh.is_first:
            folder.training_starts(config)
    announce(record, state, engine, changed)
    record.open_reports(state)
    (missed,) = mesh.sum_on_host([mesh.is_first and evaluation_missed(config, before, state)])
    loader = Loader(config, store.split("train"), mesh.data_rank, mesh.layout.data_ways, state.loader, engine.prepare)
    stack.callback(loader.close)
    profile = Profile(job.profile, folder.logs / f"trace-{mesh.rank:05d}.json")
    record.console.start(state.step)
    return Session(config, mesh, engine, optimizer, loader, record, supervisor, profile, bool(missed)), state


def _open_store(folder: Path, mesh: Mesh) -> TokenStore:
    until = time.monotonic() + STORE_SECONDS
    while not (mesh.is_first or folder.exists()):
        if time.monotonic() > until:
            what = f"there is no token store on {socket.gethostname()}, the host of rank {mesh.rank}"
            why, remedy = "every rank reads it", "put data.store on a file system that all hosts share"
            raise UserError(what, where=str(folder), why=why, remedy=remedy)
        time.sleep(0.5)
    return TokenStore.open(folder)


def _finish(job: Job, run: Session, end: TrainingEnd) -> ExitStatus:
    """Write the exit reason, export, and print the summary; rank 0 alone. A failed export loses no checkpoint."""
    folder, config, (state, status, reason, usable) = run.record.folder, job.config, end
    # Before the export, which may be cut off.
    write_exit_reason(folder, status, reason, state.step, requeue=status == ExitStatus.STOPPED)
    checkpoint = folder.checkpoints / step_name(state.step)  # the one just written, not the last by name
    export = None
    if config.checkpoint.export and usable:
        store = run.record.store
        try:
            export_checkpoint(checkpoint, folder.export, config.model, store.tokenizer_folder, store.eod)
            export = str(folder.export)
        except (OSError, ValueError, UserError) as error:
            run.record.event("save_failed", state, reason=f"export: {error}")
            remedy = f"`minka export {folder.path} FOLDER` tries again"
            run.record.console.say(f"the export could not be written ({error}); {remedy}")
            status = ExitStatus.FAILED if status == ExitStatus.DONE else status
    summarise(run.record, end._replace(status=status), export, as_json=job.as_json)
    return status
