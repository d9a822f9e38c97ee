"""One rank, from its environment to its exit status: mesh, data, model, engine, newest checkpoint, loop, export."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minka.checkpoint.commit import step_name
from minka.checkpoint.export import export_checkpoint
from minka.data.loader import Loader
from minka.data.prepare import store_folder
from minka.data.token_store import TokenStore
from minka.launch.exit_reason import explained, write_ending
from minka.launch.signals import SupervisorLink
from minka.model.transformer import Transformer
from minka.parallel.apply import build_parts, named_parameters
from minka.parallel.deepspeed_engine import build_zero_engine
from minka.parallel.engine import Engine
from minka.parallel.fsdp_engine import ShardedEngine
from minka.parallel.inputs import Feeder
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import parameter_piece
from minka.parallel.pipeline_engine import PipelineEngine
from minka.parallel.precision import compute_dtype
from minka.plan.atomic import write_json
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hardware import find
from minka.plan.ledger import Ledger
from minka.plan.padding import describe_padding
from minka.plan.pipeline_stages import stages_of
from minka.plan.resume_rules import Changes, told
from minka.plan.run_folder import RunFolder
from minka.plan.topology import describe
from minka.plan.topology import told as told_places
from minka.train.console import Console
from minka.train.final_summary import summarise
from minka.train.layer_stats import Updates
from minka.train.loop import Session, train
from minka.train.optimizer import AdamW, decay_of
from minka.train.parent_run import open_run, pinned_parent
from minka.train.profiler import Profile
from minka.train.provenance import processor
from minka.train.recorder import Recorder
from minka.train.resume import begin, on_first
from minka.train.standing import begin_again, check_goes_on
from minka.train.state import State
from minka.train.trackers import open_trackers

GROUP_SECONDS = 300.0  # beyond guard.hang_seconds: the supervisor must notice a hang before the group gives up


class WorkerJob(NamedTuple):
    """What a rank is told by whoever started it; its place comes from the environment (parallel/mesh.py)."""

    config: RunConfig
    profile: str
    as_json: bool
    threads: int | None  # of torch; None leaves torch's choice
    beat: int | None  # the supervisor's pipe
    from_scratch: bool = False  # whether a person asked to begin again although there is history
    prepared: bool = False  # whether data and run folder have been made ready by the process that forked this one


def work(job: WorkerJob) -> int:
    """Train this rank's part of the run; the exit status."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    config = job.config
    config.check(int(os.environ.get("WORLD_SIZE", "1")))
    with (
        start_mesh(config.layout, timeout_seconds=config.guard.hang_seconds + GROUP_SECONDS) as mesh,
        explained(RunFolder.of(config), speaks=mesh.is_first),
        session(job, mesh) as (run, state),
    ):
        state, status = train(run, state)
        run.profile.close()
        run.record.console.end()
        mesh.barrier()  # every rank has written what it has to
        run.supervisor.heartbeat(state.step, done=True)
        return int(_finish(job, run, state, status) if mesh.is_first else status)


def prepare_joined(config: RunConfig, command: list[str]) -> None:
    """Before ranks of torchrun or Slurm meet: the first prepares the data, the others wait for as long as it works.

    SupervisorLink the process group, whose collectives give up long before a large corpus is done. Raises UserError.
    """
    if os.environ["RANK"] == "0":
        open_run(config, command)
        return
    folder, heard = store_folder(config, Path()), time.monotonic()
    while not folder.exists():
        if any(folder.parent.glob(f".{folder.name}.preparing-*")):
            heard = time.monotonic()
        if time.monotonic() - heard > config.guard.hang_seconds:
            raise UserError(
                f"rank 0 has not prepared the token store in {config.guard.hang_seconds:g} s",
                where=str(folder),
                why="it is not there, and nobody is at work on it",
                remedy="look at rank 0's output; `minka data prepare` makes the store beforehand",
            )
        time.sleep(0.2)


@contextmanager
def session(job: WorkerJob, mesh: Mesh) -> Iterator[tuple[Session, State]]:
    """Everything a rank trains with, and the state to go on from; all of it is closed again. Collective."""
    config, folder = job.config, RunFolder.of(job.config)
    with ExitStack() as stack:
        store, changed = _open_run(job, mesh, stack)
        supervisor = SupervisorLink(mesh.rank, folder.stop_file, job.beat, folder.logs / f"stacks-{mesh.rank:05d}.txt")
        stack.callback(supervisor.close)
        supervisor.heartbeat(0)
        trackers = open_trackers(config, folder) if mesh.is_first else []
        ledger = Ledger(folder.ledger_file) if mesh.is_first else None
        console = Console(config, speaks=mesh.is_first, as_json=job.as_json)
        lineage = folder.lineage() if mesh.is_first else []
        record = Recorder(config, mesh, store, supervisor, ledger, trackers, console, lineage)
        stack.callback(record.close)
        stack.callback(console.end)
        engine, optimizer = build_engine(config, mesh)
        state = begin(engine, record, mesh)
        on_first(lambda: folder.begin(config), mesh)
        _announce(record, state, mesh, changed)
        loader = Loader(config, store.split("train"), mesh.data_rank, mesh.layout.data_ways, state.loader, mesh.device)
        stack.callback(loader.close)
        profile = Profile(job.profile, folder.logs / f"trace-{mesh.rank:05d}.json")
        console.start(state.step)
        yield Session(config, mesh, engine, optimizer, loader, record, supervisor, profile), state


def build_engine(config: RunConfig, mesh: Mesh) -> tuple[Engine, Updates]:
    """The model cut for this rank, and the engine over it; who knows of its updates beside it."""
    if mesh.layout.engine == "deepspeed":
        zero = build_zero_engine(config, mesh, lambda name, dims: decay_of(name, dims, config.optimizer))
        return zero, zero
    return engine_over(build_parts(config, mesh), Feeder(config, mesh), config, mesh)


def engine_over(
    parts: Sequence[Transformer], feeder: Feeder, config: RunConfig, mesh: Mesh
) -> tuple[PipelineEngine | ShardedEngine, AdamW]:
    """The same of parts that are built already."""
    pieces = {name: parameter_piece(parameter) for name, parameter in named_parameters(parts).items()}
    optimizer = AdamW([(n, p.local, len(p.global_shape)) for n, p in pieces.items()], config.optimizer)
    kind: type[PipelineEngine | ShardedEngine] = PipelineEngine if mesh.layout.pipeline > 1 else ShardedEngine
    return kind(parts, mesh, feeder, optimizer), optimizer


def _open_run(job: WorkerJob, mesh: Mesh, stack: ExitStack) -> tuple[TokenStore, Changes]:
    """The run's token store, and what is another than when it was last started.

    Rank 0 opens the run's folder and holds its lock; a refusal reaches every rank.
    """
    folder = RunFolder.of(job.config)
    changed: Changes = {}

    def opened() -> None:
        if not job.prepared:
            open_run(job.config, sys.argv)
        folder.check_may_start()
        stack.enter_context(folder.only_writer())
        if job.from_scratch:  # last: whatever else refuses this start has left everything as it was
            pinned_parent(folder)
            aside = begin_again(folder)
            if aside and not job.as_json:
                print(f"the checkpoints there were lie in {aside}", flush=True)
        check_goes_on(folder, job.config)
        changed.update(folder.changes(job.config))

    on_first(opened, mesh)
    return TokenStore.open(store_folder(job.config, Path())), changed


def _announce(record: Recorder, state: State, mesh: Mesh, changed: Changes) -> None:
    config = record.config
    gpu = find(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else processor()
    dtype = str(compute_dtype(config, mesh)).removeprefix("torch.")
    record.event(
        "start",
        state,
        ranks=mesh.ranks,
        layout=mesh.layout.model_dump(),
        device=device,
        compute_dtype=dtype,
        threads=torch.get_num_threads(),
        parameters=parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, config.data.seq_len),
        mfu_formula=FORMULAS["causal"],
        mfu_peak_flops=gpu.peak_flops if gpu else None,
        config=config.model_dump(mode="json"),
        changed=changed,
        lineage=record.lineage,
    )
    fillers = describe_padding(config, mesh.layout)
    for line in [*told(changed), *_placed(record, mesh), *([fillers] if fillers else [])]:
        record.console.say(line)
    record.console.say(
        f"{config.run.name}: {parameters(config.model):,} parameters, {config.total_tokens:,} tokens in "
        f"{config.total_steps:,} steps; {mesh.ranks} {'rank' if mesh.ranks == 1 else 'ranks'} on {device}, {dtype}"
    )
    train, held = record.store.split("train"), record.store.split("validation")
    epochs = config.total_tokens / train.n_tokens
    record.console.say(
        f"{record.store.folder}: {train.n_tokens:,} tokens to train on ({epochs:.2g} epochs), "
        f"{held.n_documents:,} documents held out"
    )


def _placed(record: Recorder, mesh: Mesh) -> list[str]:
    """Which rank has which place and which layers: stored, and told where it is more than a row of data ranks."""
    if mesh.topology is None or not mesh.is_first:
        return []
    layers = stages_of(mesh.layout, record.config.model)
    description = describe(mesh.layout, mesh.topology, layers)
    with suppress(OSError):  # the map is in the way of nothing
        write_json(record.folder.topology_file, description)
    hosts = {place.host for place in mesh.topology.places}
    return told_places(description) if len(hosts) > 1 or mesh.layout.data_ways < mesh.ranks else []


def _finish(job: WorkerJob, run: Session, state: State, status: ExitStatus) -> ExitStatus:
    """Say how it ended and export; rank 0 alone, while the others are done. A lost export loses no checkpoint."""
    folder, config = run.record.folder, job.config
    reason = f"step {state.step} could not be saved" if status == ExitStatus.FAILED else status.reason
    # First: the export may be cut off.
    write_ending(folder, status, reason, state.step, requeue=status == ExitStatus.STOPPED)
    checkpoint = folder.checkpoints / step_name(state.step)  # the one just written, not whatever sorts last
    export = None
    if config.checkpoint.export and checkpoint.exists():
        store = run.record.store
        try:
            export_checkpoint(checkpoint, folder.export, config.model, store.tokenizer_folder, store.eod)
            export = str(folder.export)
        except (OSError, ValueError, UserError) as error:
            run.record.event("save_failed", state, reason=f"export: {error}")
            remedy = f"`minka export {folder.path} FOLDER` tries again"
            run.record.console.say(f"the export could not be written ({error}); {remedy}")
            status = ExitStatus.FAILED if status == ExitStatus.DONE else status
    summarise(run.record, state, status, export, as_json=job.as_json)
    return status
