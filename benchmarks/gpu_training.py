"""Whole training steps at real sizes on one GPU, next to transformers with torch.compile in the same run.

A row says what a step takes: seconds, tokens a second, MFU by each convention, memory that is allocated, reserved, and
predicted. Between the steps of a measurement the host never waits for the device: torch raises where it would.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minka.benchmarks.options import require_gpu, require_one
from minka.benchmarks.step_rows import HEAD, Row, append, described, memory, name_of, rates, shown
from minka.benchmarks.training import peer_step, synthetic_batch
from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.restore import restore_from
from minka.checkpoint.write import SaveRequest
from minka.data.batch import Batch
from minka.parallel.engine import Engine
from minka.parallel.inputs import ModelInputs
from minka.parallel.local_device import local_device
from minka.parallel.mesh import start_mesh
from minka.plan.cli import print_json, print_table
from minka.plan.config import RunConfig
from minka.plan.flops import FORMULAS
from minka.plan.load_config import load_run
from minka.plan.read_file import first_line
from minka.train.accept_step import accepts
from minka.train.build_engine import build_engine
from minka.train.dry_run import dry_run

MEASURED = Path(__file__).resolve().parent.parent / "plan/measured.csv"
WARM = 5  # steps that compile, allocate and find algorithms
FITS = 0.9  # of the device's memory; the rest is for what no plan sees


class Case(NamedTuple):
    """A recipe as it is measured; `peer`: whether transformers takes a step of the same shape, too."""

    name: str
    recipe: str
    overrides: Sequence[str]
    peer: bool = True
    saves: bool = False


def cases(*, tiny: bool) -> list[Case]:
    """What is measured, in this order; tiny: the same on any machine, in seconds."""
    one = ["data.batch_warmup=[]", "checkpoint.export=false", "run.max_tokens=none", "run.max_steps=1000"]
    one += ["schedule.unit=steps", "schedule.warmup=0", "schedule.decay=0"]
    dense = [*one, "layout.micro_batch=8", "data.batch_tokens=16384"]
    large = [*one, "layout.micro_batch=1", "data.batch_tokens=8192", "optimizer.weights=bf16", "optimizer.moments=bf16"]
    own = ["kernels.implementation=triton", "kernels.compile=false"]
    if tiny:
        small = ["model.layers=2", "model.d_model=64", "model.heads=4", "model.kv_heads=2", "model.head_dim=16"]
        small += ["model.d_ff=96", "model.vocab=512", "data.seq_len=32", "kernels.compile=false"]
        dense += [*small, "data.batch_tokens=256"]
        large += [*small, "data.batch_tokens=32"]
    return [
        Case("dense-1b", "dense-1b", dense, saves=True),
        Case("dense-1b, Triton, not compiled", "dense-1b", [*dense, *own], peer=False),
        Case("8B, bf16 state", "llama3-8b", large),
        Case("8B, bf16 state, selective recompute", "llama3-8b", [*large, "layout.recompute=selective"], peer=False),
    ]


def main() -> int:
    """Measure the cases whose name contains --only; return 1 where one fails."""
    parser = argparse.ArgumentParser(description="Training steps at real sizes on one GPU, next to transformers.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--steps", type=int, default=50, help="that are timed; 50 unless given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing further after so long")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see on any machine that everything runs")
    parser.add_argument("--csv", type=Path, help=f"append the rows to this file; on a GPU {MEASURED.name} unless given")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    require_gpu(parser, tiny=options.tiny)
    require_one(parser, options.only, (case.name for case in cases(tiny=options.tiny)))
    device = local_device()
    file = options.csv or (MEASURED if device.type == "cuda" and not options.tiny else None)
    end, rows, failed = time.monotonic() + options.seconds, [], []
    for case in cases(tiny=options.tiny):
        if options.only not in case.name:
            continue
        if time.monotonic() > end:
            failed.append(f"{case.name}: no time was left")
            continue
        say(case.name)
        try:
            rows.append(measure(case, device, options.steps, end, tiny=options.tiny))
            if file:  # now: what comes may be cut off
                append(file, rows[-1:])
        except Exception as error:  # out of memory, a wait of the host, or what nobody thought of
            failed.append(f"{case.name}: {type(error).__name__}: {first_line(error)}")
        _free(device)
    if options.json:
        print_json({"rows": rows, "failed": failed})
    else:
        title = f"{name_of(device)}, torch {torch.__version__}; MFU: {FORMULAS['causal']}"
        print_table([shown(row) for row in rows], HEAD, title=title)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def measure(case: Case, device: torch.device, steps: int, end: float, *, tiny: bool) -> Row:
    """Time `steps` steps of a case, and where it says so save and resume; then the peer's."""
    config = fitted(load_run(case.recipe, case.overrides).config, device)
    # One target a row is left out on both sides.
    batch = synthetic_batch(config.model.vocab, config.layout.micro_batch, config.data.seq_len)
    row = described(case.name, config, device) | _of_ours(case, config, batch, device, steps)
    _free(device)
    if case.peer and time.monotonic() < end:
        row |= _of_peer(config, batch, device, steps, row["step_seconds"], tiny=tiny)
    return row


def _of_ours(case: Case, config: RunConfig, batch: Batch, device: torch.device, steps: int) -> Row:
    with start_mesh(config.layout, casts=config.optimizer.weights == "bf16") as mesh:
        engine, _ = build_engine(config, mesh)
        inputs = engine.prepare(batch)
        seconds = _timed(lambda: _step(engine, inputs, batch.target_count, config), device, steps, guarded=True)
        say(f"  {1e3 * seconds:.4g} ms a step")
        row: Row = {"kernels": json.dumps(engine.kernels.ways())}
        row |= rates(config, device, seconds, batch.tokens.numel()) | memory(device)
        if case.saves:
            row["resumed_loss_difference"] = _resumed(engine, inputs, batch.target_count, config)
        return row


def fitted(config: RunConfig, device: torch.device) -> RunConfig:
    """The run with as many layers as a dry run says that the device's memory has room for."""
    if device.type != "cuda":
        return config
    room, layers = FITS * torch.cuda.get_device_properties(device).total_memory, config.model.layers
    whole = dry_run(config, 1, 0).memory.total
    if whole <= room or layers == 1:
        return config
    half = dry_run(_with_layers(config, layers // 2), 1, 0).memory.total
    each = (whole - half) / (layers - layers // 2)  # every layer holds the same
    return _with_layers(config, max(1, layers // 2 + int((room - half) // each)))


def _with_layers(config: RunConfig, layers: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": layers})})


def _step(engine: Engine, inputs: ModelInputs, targets: int, config: RunConfig) -> torch.Tensor:
    """One whole step; its loss stays on the device."""
    sums = engine.forward_backward([inputs], targets)
    accept = accepts(sums, engine.grad_norm())
    engine.apply(config.optimizer.learning_rate, config.optimizer.max_norm, accept)
    return sums.loss


def _timed(step: Callable[[], object], device: torch.device, steps: int, *, guarded: bool) -> float:
    """Seconds of a step, over `steps` after WARM others; guarded: the host may not wait for the device meanwhile."""
    for _ in range(WARM):
        step()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    with _no_waits(device if guarded else torch.device("cpu")):
        for _ in range(steps):
            step()
    _wait(device)
    return (time.perf_counter() - began) / steps


@contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _resumed(engine: Engine, inputs: ModelInputs, targets: int, config: RunConfig) -> float:
    """Save, take two steps, restore, take them again: the relative difference of the losses."""
    with tempfile.TemporaryDirectory() as folder:
        saver = AsyncSaver(Path(folder), engine.mesh, 1)
        saver.save(SaveRequest(1, {"step": 1}), engine.tensors())
        saver.wait_for_copy()
        losses = [float(_step(engine, inputs, targets, config)) for _ in range(2)]
        outcome = saver.wait()
        assert outcome is not None
        assert not outcome.error, outcome.error
        say(f"  saved {outcome.bytes / 1e9:.3g} GB in {outcome.total_seconds:.3g} s, of which training waited "
             f"{outcome.stall_seconds:.2g} s")  # fmt: skip
        restore_from(outcome.path, engine.tensors(), engine.mesh)
        engine.after_restore()
        again = [float(_step(engine, inputs, targets, config)) for _ in range(2)]
    difference = max(abs(a / b - 1) for a, b in zip(again, losses, strict=True))
    assert difference < 1e-3, f"losses after a restore differ by {difference:.2g}"
    return difference


def _of_peer(config: RunConfig, batch: Batch, device: torch.device, steps: int, ours: float, *, tiny: bool) -> Row:
    """The peer keeps weights, gradients and moments in bf16, whatever ours are in, and rounds them to nearest."""
    dtype, recompute = torch.bfloat16 if device.type == "cuda" else torch.float32, config.layout.recompute != "none"
    options: dict[str, Any] = {"device": device.type, "dtype": dtype, "recompute": recompute}
    try:
        seconds = _timed(peer_step(config, batch, compiled=not tiny, **options), device, steps, guarded=False)
    except Exception as error:  # out of memory, or a version of it that cannot; ours has been measured
        return {"peer": f"{type(error).__name__}: {first_line(error)}"}
    found = {f"peer_{name}": value for name, value in memory(device).items()}
    return {"peer_step_seconds": seconds, "peer": f"{seconds / ours:.3g}x", **found}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
