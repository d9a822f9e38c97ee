"""One rank, from its environment to its exit status: mesh, data, model, engine, newest checkpoint, loop, export."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from minka.data.loader import Loader
from minka.data.prepare import open_or_prepare
from minka.data.store import TokenStore
from minka.parallel.apply import build_model, compute_dtype
from minka.parallel.checkpoint import checkpoints, restore
from minka.parallel.engine import ShardedEngine
from minka.parallel.export import export_checkpoint
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import piece_of
from minka.plan.cli import progress
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hardware import find
from minka.plan.run import Ledger, RunFolder, write_json
from minka.train.console import Console
from minka.train.loop import Session, train
from minka.train.optim import AdamW
from minka.train.profile import Profile
from minka.train.provenance import processor, provenance
from minka.train.record import Record
from minka.train.signals import Outside
from minka.train.state import State
from minka.train.summary import summarise
from minka.train.track import open_trackers

REASONS = {
    ExitStatus.DONE: "done",
    ExitStatus.STOPPED: "stopped and saved",
    ExitStatus.NEEDS_PERSON: "stopped by a rule",
    ExitStatus.FAILED: "the last checkpoint could not be written",
}


class WorkerJob(NamedTuple):
    """What a rank is told by whoever started it; its place comes from the environment (parallel/mesh.py)."""

    config: RunConfig
    profile: str
    as_json: bool
    threads: int | None  # of torch; None leaves torch's choice
    beat: int | None  # the supervisor's pipe


def work(job: WorkerJob) -> int:
    """Train this rank's part of the run; the exit status."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    config = job.config
    with start_mesh(config.layout, timeout_seconds=config.guard.hang_seconds) as mesh:
        with session(job, mesh) as (run, state):
            state, status = train(run, state)
            run.profile.close()
            run.record.console.end()
            run.record.event("stop", state, reason=REASONS[status])
        mesh.barrier()  # every rank is done with the folder before one of them exports
        if mesh.is_first:
            _finish(job, run, state, status)
    return int(status)


@contextmanager
def session(job: WorkerJob, mesh: Mesh) -> Iterator[tuple[Session, State]]:
    """Everything a rank trains with, and the state to go on from; all of it is closed again. Collective."""
    config, folder = job.config, RunFolder.of(job.config)
    with ExitStack() as stack:
        store = _shared_store(config, mesh)
        outside = Outside(mesh.rank, folder.stop_file, job.beat, folder.logs / f"stacks-{mesh.rank:05d}.txt")
        stack.callback(outside.close)
        outside.alive(0)
        trackers = open_trackers(config, folder) if mesh.is_first else []
        ledger = Ledger(folder.ledger_file) if mesh.is_first else None
        console = Console(config, speaks=mesh.is_first, as_json=job.as_json)
        record = Record(config, mesh, store, outside, ledger, trackers, console)
        stack.callback(record.close)
        stack.callback(console.end)
        engine, optimizer = build_engine(config, mesh)
        state = _restored(engine, record, mesh)
        _announce(record, state, engine, mesh)
        loader = Loader(config, store.split("train"), mesh.data_rank, mesh.layout.data_ways, state.loader, mesh.device)
        stack.callback(loader.close)
        profile = Profile(job.profile, folder.logs / f"trace-{mesh.rank:05d}.json")
        console.begin(state.step)
        yield Session(config, mesh, engine, optimizer, loader, record, outside, profile), state


def build_engine(config: RunConfig, mesh: Mesh) -> tuple[ShardedEngine, AdamW]:
    """The model cut for this rank, its optimizer, and the engine over both."""
    model = build_model(config, mesh)
    pieces = {name: piece_of(parameter) for name, parameter in model.named_parameters()}
    optimizer = AdamW([(n, p.local, len(p.global_shape)) for n, p in pieces.items()], config.optimizer)
    return ShardedEngine(model, mesh, optimizer), optimizer


def _shared_store(config: RunConfig, mesh: Mesh) -> TokenStore:
    """The token store; rank 0 makes it (and the run's folder) if nobody has, and a refusal reaches every rank."""
    problem: UserError | None = None
    if mesh.is_first and not (job_is_prepared(config)):
        try:
            store = open_or_prepare(config, Path(), progress)
            RunFolder.of(config).open(config, provenance(config, store))
        except UserError as error:
            problem = error
    if any(mesh.sum_on_host([problem is not None])):
        raise problem or SystemExit(int(ExitStatus.REFUSED))  # the first rank says why
    return open_or_prepare(config, Path(), progress)


def job_is_prepared(config: RunConfig) -> bool:
    """Whether a supervisor has opened the run's folder with this very configuration already."""
    return "MINKA_STORE" in os.environ and RunFolder.of(config).exists()


def _restored(engine: ShardedEngine, record: Record, mesh: Mesh) -> State:
    damaged: list[dict[str, str]] = []
    saved = restore(
        record.folder.checkpoints,
        engine.tensors(),
        mesh,
        lambda path, reason: damaged.append({"path": str(path), "reason": reason}),
    )
    state = State() if saved is None else State.from_json(saved)
    for one in damaged:
        record.event("fallback", state, **one)
        record.console.say(f"{one['path']} is damaged ({one['reason']}); taking the one before")
    if saved is not None:
        record.event("restore", state, reason="the run is going on")
        record.console.say(f"going on from step {state.step}")
    return state


def _announce(record: Record, state: State, engine: ShardedEngine, mesh: Mesh) -> None:
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
        parameters=parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, config.data.seq_len),
        mfu_formula=FORMULAS["causal"],
        mfu_peak_flops=gpu.peak_flops if gpu else None,
    )
    record.console.say(
        f"{config.run.name}: {parameters(config.model):,} parameters, {config.total_tokens:,} tokens in "
        f"{config.total_steps:,} steps; {mesh.ranks} x {device}, {dtype}"
    )


def _finish(job: WorkerJob, run: Session, state: State, status: ExitStatus) -> None:
    folder, config = run.record.folder, job.config
    saved = checkpoints(folder.checkpoints)
    if config.checkpoint.export and saved:
        export_checkpoint(
            saved[-1], folder.export, config.model, run.record.store.tokenizer_folder, run.record.store.eod
        )
    requeue = status == ExitStatus.STOPPED
    write_json(
        folder.exit_file, {"code": int(status), "reason": REASONS[status], "step": state.step, "requeue": requeue}
    )
    summarise(run.record, state, status, as_json=job.as_json)
