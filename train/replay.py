"""`minka train RUN --replay N`: run a step again, on one process, from the checkpoint before it, and compare.

Nothing is written into the run but a lease while its checkpoint is read; it may be in training meanwhile.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minka.checkpoint.catalogue import checkpoints, run_and_step
from minka.checkpoint.commit import step_name
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore_from
from minka.data.batch import PADDING, Batch
from minka.data.loader import Loader, order_of
from minka.data.token_store import TokenStore
from minka.data.trace import trace_window
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.precision import compute_dtype
from minka.plan.cli import print_json, progress
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.layout import AXES
from minka.plan.ledger import is_count, read_ledger
from minka.plan.load_config import load_run, validate
from minka.plan.run_folder import RunFolder, find_run, store_of
from minka.train.build_engine import build_engine
from minka.train.guard import accepts, refuse_tokens
from minka.train.metrics import Metrics, Stopwatch
from minka.train.parent_run import begins_at, pinned_parent
from minka.train.provenance import processor
from minka.train.replay_compare import (
    BOUNDS,
    VERDICTS,
    Line,
    Recorded,
    check_comparable,
    checkpoint_before,
    differences,
    recorded,
    verdicts,
)
from minka.train.restore_or_init import load_parent
from minka.train.schedule import learning_rate
from minka.train.state import State

SHOWN_SAMPLES = 8


class Replay(NamedTuple):
    """What is needed to run steps again."""

    folder: RunFolder
    store: TokenStore
    found: Recorded
    step: int
    origin: Path | None  # a checkpoint; None: where the run began


def replay_command(source: str, step: int, as_json: bool) -> int:
    """Run step `step` of a run again and say whether it is the same; the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a step is run again on one process, and many were started", where="--replay")
    path = Path(source)
    by_file = path.suffix == ".toml" and path.name != "run.toml" and path.is_file()
    folder = RunFolder.of(load_run(source).config) if by_file else find_run(run_and_step(source)[0])
    result = replay(folder, step)
    if as_json:
        print_json(result)
    else:
        print("\n".join(told(result)))
    return int(result["status"])


def replay(folder: RunFolder, step: int) -> dict[str, Any]:
    """Recorded and replayed numbers of all steps from the checkpoint before `step` to it, the verdict, the samples."""
    found = recorded(read_ledger(folder.ledger_file))
    there = [int(path.name.removeprefix("step-")) for path in checkpoints(folder.checkpoints)]
    before = checkpoint_before(found, step, there, str(folder.path))
    check_comparable(found.steps[step].event, str(folder.ledger_file))
    origin = None if before is None else folder.checkpoints / step_name(before)
    job = Replay(folder, _store(folder), found, step, origin)
    start = found.steps[step].start
    config = settings(folder, found.steps[step])
    if is_count(start.get("threads")):  # sums over other parts round otherwise
        torch.set_num_threads(min(max(1, start["threads"]), os.cpu_count() or 1))
    with start_mesh(config.layout) as mesh:
        steps, batch, origin_said = _run(job, mesh)
        here = {
            "ranks": 1,
            "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else processor(),
            "compute_dtype": str(compute_dtype(config, mesh)).removeprefix("torch."),
        }
    dtype = str(here["compute_dtype"])
    found_out = verdicts({at: compared for at, compared in steps.items() if compared}, dtype)
    worst = max(found_out.values(), key=VERDICTS.index)
    return {
        "run": str(folder.path),
        "step": step,
        "from": origin_said,
        "recorded": {key: start.get(key) for key in here},
        "replayed": here,
        "verdict": worst,
        "status": int(ExitStatus.FAILED if worst == "differs" else ExitStatus.DONE),
        "bounds": BOUNDS.get(dtype, BOUNDS["float32"]),
        "first_difference": next((at for at, one in found_out.items() if one == "differs"), None),
        "steps": [{"step": at, **compared} for at, compared in steps.items()],
        "samples": _samples(config, job.store, batch),
    }


def settings(folder: RunFolder, line: Line) -> RunConfig:
    """The configuration in force at a step, on one rank, computing in the dtype that was recorded."""
    known = line.start.get("config")
    config = validate(known, f"{folder.ledger_file}, a start event's config") if known else folder.config()
    dtypes = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}
    precision = dtypes.get(str(line.start.get("compute_dtype")), "auto")
    layout = config.layout.model_copy(
        update={**dict.fromkeys(AXES, 1), "precision": precision, "engine": "fsdp", "offload": "none"}
    )
    return config.model_copy(update={"layout": layout})


def told(result: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    was, here, steps = result["recorded"], result["replayed"], result["steps"]
    last, earlier = steps[-1], [one for one in steps[:-1] if len(one) > 1]  # of the others nothing is recorded
    ranks = f"{was['ranks']} {'rank' if was['ranks'] == 1 else 'ranks'}"
    lines = [
        f"step {result['step']} of {result['run']}, run again from {result['from']}",
        f"recorded on {ranks} on {was['device']}, {was['compute_dtype']}",
        f"replayed on 1 rank on {here['device']}, {here['compute_dtype']}",
        f"{'':<14} {'recorded':>22} {'replayed':>22}  difference",
    ]
    for name, numbers in last.items():
        if name != "step":
            pair = f"{numbers['recorded']!r:>22} {numbers['replayed']!r:>22}"
            lines.append(f"{name:<14} {pair}  {numbers['difference']:.1e}")
    if earlier:
        apart = {name: [one[name]["difference"] for one in earlier if name in one] for name in ("loss", "grad_norm")}
        most = {name: max(found, default=0.0) for name, found in apart.items()}
        span = f"{len(earlier)} {'step' if len(earlier) == 1 else 'steps'} on the way"
        lines.append(f"{span}: loss at most {most['loss']:.1e} apart, norm {most['grad_norm']:.1e}")
    for sample in result["samples"][:SHOWN_SAMPLES]:
        pieces = ", ".join(
            f"{p['provenance'].get('path') or p['provenance'].get('id')}[{p['first']}:{p['last']}]"
            for p in sample["pieces"]
        )
        lines.append(f"sample {sample['sample']}: {pieces}")
    left = len(result["samples"]) - SHOWN_SAMPLES
    if left > 0:
        lines.append(f"and {left} more samples (--json lists them; `minka data inspect RUN --sample I` shows one)")
    return [*lines, _said(result)]


def _said(result: Mapping[str, Any]) -> str:
    bounds = result["bounds"]
    limit = (
        f"{result['replayed']['compute_dtype']}: loss {bounds['loss']:.1e}, norm {bounds['grad_norm']:.1e}, relative"
    )
    if result["verdict"] == "bit for bit":
        return "bit for bit the same"
    if result["verdict"] == "equal to rounding":
        return f"equal to rounding ({limit})"
    if result["verdict"] == "rounding that grew":
        way = f"{len(result['steps'])} steps from the checkpoint"
        return f"the same, as far as can be told: rounding that grew over {way}, with no jump ({limit} a single step)"
    elsewhere = result["recorded"]["device"] != result["replayed"]["device"]
    note = "; it was recorded on another device, which may be all there is to it" if elsewhere else ""
    return f"DIFFERS from step {result['first_difference']} on, by more than rounding ({limit}){note}"


def _store(folder: RunFolder) -> TokenStore:
    """The run's token store, the very one. Raises UserError."""
    store = TokenStore.open(store_of(folder).folder)
    data = json.loads((folder.path / "provenance.json").read_text(encoding="utf-8"))["data"]
    if data.get("manifest_sha256") not in (None, store.hash):
        raise UserError(
            "the token store is not the one this run was trained on",
            where=str(store.folder),
            why="the same samples would be other text",
            remedy="put the old store back",
        )
    return store


def _run(job: Replay, mesh: Mesh) -> tuple[dict[int, dict[str, dict[str, float]]], Batch, str]:
    """Differences by step, the batch of the last one, and what was begun from."""
    first = min(job.found.steps) if job.origin is None else int(job.origin.name.removeprefix("step-")) + 1
    config = _in_force(job, first) or settings(job.folder, job.found.steps[job.step])
    engine, _ = build_engine(config, mesh)
    state, said = _begin(job, config, engine, mesh)
    compared: dict[int, dict[str, dict[str, float]]] = {}
    with progress(job.step - state.step, "running again", "steps") as advance, ExitStack() as stack:
        loader = stack.enter_context(_loader(job, config, state, mesh))
        while state.step < job.step:
            now = _in_force(job, state.step + 1) or config
            if now != config:  # the run went on with other settings here
                engine, config = _moved(engine, now, mesh), now
                loader.close()
                loader = stack.enter_context(_loader(job, config, state, mesh))
            state, numbers, batch = _step(config, engine, loader, state, mesh)
            line = job.found.steps.get(state.step)
            compared[state.step] = differences(line.event, numbers) if line else {}
            advance(1)
    return compared, batch, said


def _begin(job: Replay, config: RunConfig, engine: Engine, mesh: Mesh) -> tuple[State, str]:
    if job.origin is not None:
        with leased(job.folder.path, job.origin):
            saved = restore_from(job.origin, engine.tensors(), mesh)
            engine.after_restore()
            return State.from_json(saved), str(job.origin)
    parent = pinned_parent(job.folder)
    if parent is None:
        return State(), "its initial weights"
    load_parent(parent, engine, config.run.start_with, mesh)
    return State(*begins_at(parent, config, job.store.hash)[0]), f"its parent, {parent.name}"


def _in_force(job: Replay, step: int) -> RunConfig | None:
    line = job.found.steps.get(step)
    return settings(job.folder, line) if line else None


def _loader(job: Replay, config: RunConfig, state: State, mesh: Mesh) -> Loader:
    return Loader(config, job.store.split("train"), 0, 1, state.loader, mesh.device)


def _moved(engine: Engine, config: RunConfig, mesh: Mesh) -> Engine:
    """An engine for other settings with the same tensors in it."""
    other, _ = build_engine(config, mesh)
    old = engine.tensors()
    with torch.no_grad():
        for name, piece in other.tensors().items():
            piece.local.copy_(old[name].local)
    other.after_restore()
    return other


def _step(
    config: RunConfig, engine: Engine, loader: Loader, state: State, mesh: Mesh
) -> tuple[State, dict[str, Any], Batch]:
    """One step as train/loop.py takes it: the state after it, its numbers, its batch."""
    batch, loaded = next(loader)
    parts = [part.to(mesh.device) for part in batch.micro_batches(config.layout.micro_batch)]
    if batch.largest_token() >= config.model.vocab:
        refuse_tokens(batch, config.model.vocab, mesh)
    rate = learning_rate(config, state.step, state.tokens)
    sums = engine.forward_backward(parts, batch.target_count)
    norm = engine.grad_norm()
    engine.apply(rate, config.optimizer.max_norm, accepts(sums, norm))
    state, metrics = state.after(loaded), Metrics(config, mesh)
    metrics.note(state, sums, norm, rate, batch.target_count, Stopwatch())
    (record,) = metrics.flush()
    return state, record._asdict(), batch


def _samples(config: RunConfig, store: TokenStore, batch: Batch) -> list[dict[str, Any]]:
    """The sample ids of a batch, with the documents that each was cut from."""
    split = store.split("train")
    ids = [sample for sample in batch.samples.tolist() if sample != PADDING]
    windows = order_of(config, split).windows_at(ids)
    return [
        {
            "sample": sample,
            "window": int(window),
            "pieces": [piece.as_dict() for piece in trace_window(split, int(window), config.data.seq_len)],
        }
        for sample, window in zip(ids, windows, strict=True)
    ]
