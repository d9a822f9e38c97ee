"""`minka train RUN --replay N`: run a step again on one process, from the checkpoint before it, and compare.

Nothing is written into the run except a lease while its checkpoint is read: it may be training meanwhile.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minka.checkpoint.catalogue import checkpoints, run_and_step
from minka.checkpoint.commit import step_name
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore_from
from minka.data.batch import PADDING, Batch
from minka.data.loader import Loader, order_of
from minka.data.token_store import TokenStore
from minka.launch.environment import check_one_process
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh, start_mesh
from minka.plan.cli import print_json, print_table, progress
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.layout import AXES, counted
from minka.plan.ledger import is_count, read_ledger
from minka.plan.load_config import load_run, validate
from minka.plan.read_file import reading
from minka.plan.run_folder import RunFolder, find_run, store_of
from minka.train.accept_step import accepts, refuse_tokens
from minka.train.build_engine import build_engine
from minka.train.metrics import Metrics, StepRecord, Stopwatch
from minka.train.parent_run import begins_at, pinned_parent
from minka.train.provenance import processor
from minka.train.replay_compare import (
    BOUNDS,
    VERDICTS,
    RecordedRun,
    check_comparable,
    checkpoint_before,
    differences,
    recorded_run,
    verdicts,
)
from minka.train.restore_or_init import load_parent
from minka.train.schedule import learning_rate
from minka.train.state import State

SHOWN_SAMPLES = 8
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class Replay:
    """A step to replay, and what it is replayed from."""

    folder: RunFolder
    store: TokenStore
    recorded: RecordedRun
    step: int
    checkpoint: int | None  # its step; None: from the start of the run

    def settings(self, step: int) -> RunConfig:
        """Return the configuration that `step` was taken with, on one rank and computing in the recorded dtype.

        For a step that the ledger lost: that of the next recorded step.
        """
        start = self.recorded.steps[min(at for at in self.recorded.steps if at >= step)].start
        values, where = start.get("config"), f"{self.folder.ledger_file}, a start event's config"
        config = validate(values, where) if values else self.folder.config()
        precision = PRECISIONS.get(str(start.get("compute_dtype")), "auto")
        one_rank = {**dict.fromkeys(AXES, 1), "precision": precision, "engine": "fsdp", "offload": "none"}
        return config.model_copy(update={"layout": config.layout.model_copy(update=one_rank)})


def replay_command(source: str, step: int, as_json: bool) -> int:
    """Replay step `step` of a run and print how it compares. Return the exit status."""
    check_one_process(os.environ, "a replay")
    path = Path(source)
    by_file = path.suffix == ".toml" and path.name != "run.toml" and path.is_file()
    folder = RunFolder.of(load_run(source).config) if by_file else find_run(run_and_step(source)[0])
    result = replay(folder, step)
    if as_json:
        print_json(result)
    else:
        print_result(result)
    return int(result["status"])


def replay(folder: RunFolder, step: int) -> dict[str, Any]:
    """Replay all steps from the checkpoint before `step` to `step`. Return what `--json` prints. Raises UserError."""
    with reading(folder.ledger_file):
        recorded = recorded_run(read_ledger(folder.ledger_file))
    on_disk = [int(path.name.removeprefix("step-")) for path in checkpoints(folder.checkpoints)]
    checkpoint = checkpoint_before(recorded, step, on_disk, str(folder.path))
    event, start = recorded.steps[step]
    check_comparable(event, str(folder.ledger_file))
    store = TokenStore.open(store_of(folder).folder)
    folder.check_data(store.folder, store.hash)
    job = Replay(folder, store, recorded, step, checkpoint)
    config = job.settings(step)
    if is_count(start.get("threads")):  # a sum over a different number of threads rounds differently
        torch.set_num_threads(min(max(1, start["threads"]), os.cpu_count() or 1))
    with start_mesh(config.layout, casts=True) as mesh:  # some steps may be of bf16 weights
        steps, batch, origin = _run_steps(job, mesh)
        dtype = str(mesh.compute_dtype).removeprefix("torch.")
        device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else processor()
    replayed = {"ranks": 1, "device": device, "compute_dtype": dtype}
    split, ids = store.split("train"), [sample for sample in batch.samples.tolist() if sample != PADDING]
    windows = order_of(config, split).windows_at(ids).tolist()
    if config.optimizer.weights == "bf16":  # a rounding difference may round a weight the other way
        dtype = "bfloat16"
    judged = verdicts({at: compared for at, compared in steps.items() if compared}, dtype)
    verdict = max(judged.values(), key=VERDICTS.index)
    return {
        "run": str(folder.path),
        "step": step,
        "from": origin,
        "recorded": {key: start.get(key) for key in replayed},
        "replayed": replayed,
        "verdict": verdict,
        "status": int(ExitStatus.FAILED if verdict == "differs" else ExitStatus.DONE),
        "bounds": BOUNDS.get(dtype, BOUNDS["float32"]),
        "first_difference": next((at for at, one in judged.items() if one == "differs"), None),
        "steps": [{"step": at, **compared} for at, compared in steps.items()],
        "samples": [
            {"sample": sample, "window": window, "pieces": split.trace_window(window, config.data.seq_len)}
            for sample, window in zip(ids, windows, strict=True)
        ],
    }


def _run_steps(job: Replay, mesh: Mesh) -> tuple[dict[int, dict[str, dict[str, float]]], Batch, str]:
    """Return the differences by step, the batch of the last step, and what the replay started from."""
    config = job.settings((job.checkpoint or 0) + 1)
    mesh = replace(mesh, layout=config.layout)  # its precision may differ from that of the last step
    engine, _ = build_engine(config, mesh)
    state, origin = _restore(job, config, engine, mesh)
    compared: dict[int, dict[str, dict[str, float]]] = {}
    with progress(job.step - state.step, "replaying", "steps") as advance:
        while state.step < job.step:
            settings = job.settings(state.step + 1)
            if settings != config:  # here the run was resumed with different settings
                config, before = settings, engine.tensors()
                mesh = replace(mesh, layout=config.layout)
                engine, _ = build_engine(config, mesh)
                with torch.no_grad():
                    for name, piece in engine.tensors().items():
                        piece.local.copy_(before[name].local)
                engine.after_restore()
            with Loader(config, job.store.split("train"), 0, 1, state.loader, engine.prepare) as loader:
                while state.step < job.step and job.settings(state.step + 1) == config:
                    state, record, batch = _run_step(config, engine, loader, state, mesh)
                    recorded = job.recorded.steps.get(state.step)
                    compared[state.step] = differences(recorded.event, record._asdict()) if recorded else {}
                    advance(1)
    return compared, batch, origin


def _restore(job: Replay, config: RunConfig, engine: Engine, mesh: Mesh) -> tuple[State, str]:
    """Load the state before the first step into the engine. Return it, and where it came from."""
    if job.checkpoint is not None:
        path = job.folder.checkpoints / step_name(job.checkpoint)
        with leased(job.folder.path, path):
            saved = restore_from(path, engine.tensors(), mesh)
            engine.after_restore()
            return State.from_json(saved), str(path)
    parent = pinned_parent(job.folder)
    if parent is None:
        return State(), "its initial weights"
    load_parent(parent, engine, config.run.start_with, mesh)
    return State(*begins_at(parent, config, job.store.hash)[0]), f"its parent, {parent.name}"


def _run_step(
    config: RunConfig, engine: Engine, loader: Loader, state: State, mesh: Mesh
) -> tuple[State, StepRecord, Batch]:
    """Run one step as train/loop.py does. Return the state after it, its numbers, and its batch."""
    batch, micro_batches, loaded = next(loader)
    if batch.largest_token() >= config.model.vocab:
        refuse_tokens(batch, config.model.vocab, mesh)
    rate = learning_rate(config, state.step, state.tokens)
    sums = engine.forward_backward(micro_batches, batch.target_count)
    norm = engine.grad_norm()
    engine.apply(rate, config.optimizer.max_norm, accepts(sums, norm))
    state, metrics = state.after(loaded), Metrics(config, mesh, state)
    metrics.note(state, sums, norm, rate, batch.target_count, Stopwatch())
    (record,) = metrics.flush()
    return state, record, batch


def print_result(result: Mapping[str, Any]) -> None:
    """Print what `replay` returns, for people."""
    recorded, replayed = result["recorded"], result["replayed"]
    *earlier, last = result["steps"]
    earlier = [one for one in earlier if len(one) > 1]  # the ledger has no numbers of the other steps
    print(f"step {result['step']} of {result['run']}, replayed from {result['from']}")
    sides = [
        f"{counted(one['ranks'], 'rank')} on {one['device']}, {one['compute_dtype']}" for one in (recorded, replayed)
    ]
    rows = [("run on", *sides, "")]
    rows += [
        (name, repr(numbers["recorded"]), repr(numbers["replayed"]), f"{numbers['difference']:.1e}")
        for name, numbers in last.items()
        if name != "step"
    ]
    print_table(rows, ("", "recorded", "replayed", "difference"))
    if earlier:
        numbers = [{name: one[name]["difference"] for name in one if name != "step"} for one in earlier]
        loss, norm = (max(found.get(name, 0.0) for found in numbers) for name in ("loss", "grad_norm"))
        print(f"largest difference in the {counted(len(earlier), 'step')} before it: loss {loss:.1e}, norm {norm:.1e}")
    for sample in result["samples"][:SHOWN_SAMPLES]:
        spans = ", ".join(
            f"{span['provenance'].get('path') or span['provenance'].get('id')}[{span['first']}:{span['last']}]"
            for span in sample["pieces"]
        )
        print(f"sample {sample['sample']}: {spans}")
    left = len(result["samples"]) - SHOWN_SAMPLES
    if left > 0:
        print(f"and {left} more samples (--json lists them; `minka data inspect RUN --sample I` shows one)")
    verdict, bounds, note = result["verdict"], result["bounds"], ""
    if verdict == "differs":
        verdict = f"DIFFERS from step {result['first_difference']} on, by more than rounding"
        if recorded["device"] != replayed["device"]:
            note = "; it was recorded on a different device, which may be the only cause"
    limits = f"loss {bounds['loss']:.1e}, norm {bounds['grad_norm']:.1e}, relative, for a single step"
    print(f"{verdict} ({replayed['compute_dtype']}: {limits}){note}")
