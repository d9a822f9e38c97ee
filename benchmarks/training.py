"""`make bench`: speed beside a peer in the same minute, as ratios. One table; absolute times are of no use here.

Each pair runs ours and the peer's one after the other, in turn first; a row is the median of the pairs' ratios.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minka.benchmarks import checkpoints as saves
from minka.benchmarks.data_path import samples_per_second, synthetic_stream
from minka.data.batch import Batch
from minka.parallel.engine import Engine
from minka.parallel.mesh import start_mesh
from minka.plan.cli import print_json
from minka.plan.config import RunConfig
from minka.plan.hub_config import family_of, to_config
from minka.plan.ledger import read_ledger
from minka.plan.load_config import validate
from minka.train.build_engine import build_engine
from minka.train.final_summary import table

PAIRS = 5
SEQUENCES, SEQ_LEN = 16, 256
SHAPES: dict[str, dict[str, int]] = {
    "1M": {"layers": 4, "d_model": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "d_ff": 384, "vocab": 2048},
    "20M": {"layers": 8, "d_model": 384, "heads": 6, "kv_heads": 2, "head_dim": 64, "d_ff": 1024, "vocab": 8192},
}
SECONDS_A_SIDE = 3.0


class Row(NamedTuple):
    """One claim: what was measured, the bound it must keep, and whether a larger figure is better."""

    name: str
    value: float
    bound: float
    larger_is_better: bool
    unit: str

    def kept(self, slack: float = 1.0) -> bool:
        """Whether that share of the bound holds."""
        if self.larger_is_better:
            return self.value >= slack * self.bound
        return self.value <= self.bound / slack


def main() -> int:
    """Run the rows whose name contains --only (default: all); exit status 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description="Speed beside a peer, as ratios.")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--slack", type=float, default=1.0, help="of each bound, the share that must be kept")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    rows = []
    for name, measure in ROWS.items():
        if options.only in name:
            value = measure()
            rows.append(Row(name, value, *BOUNDS[name]))
            print(f"{name}: {value:.4g}", file=sys.stderr, flush=True)
    if options.json:
        print_json([row._asdict() | {"kept": row.kept()} for row in rows])
    else:
        print(table({row.name: _line(row) for row in rows}))
    return 0 if all(row.kept(options.slack) for row in rows) else 1


def _line(row: Row) -> str:
    sign = ">=" if row.larger_is_better else "<="
    return f"{row.value:>10.4g} {row.unit}  (bound {sign} {row.bound:g}{'' if row.kept() else ', BROKEN'})"


def config_of(shape: str, compiled: bool, folder: str = "bench") -> RunConfig:
    """A run of one of SHAPES on batches that are made up here; nothing of it touches the disk."""
    return validate(
        {
            "run": {"name": "bench", "max_steps": 1000, "folder": folder},
            "model": SHAPES[shape],
            "data": {"seq_len": SEQ_LEN, "batch_tokens": SEQUENCES * SEQ_LEN},
            "optimizer": {"learning_rate": 1e-3},
            "layout": {"micro_batch": SEQUENCES},
            "kernels": {"compile": compiled},
        },
        "bench",
    )


def made_up_batch(vocab: int, sequences: int, seq_len: int = SEQ_LEN) -> Batch:
    """Random tokens, one document a row: what a plain causal model can train on too."""
    tokens = torch.randint(vocab, (sequences, seq_len + 1), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(sequences, seq_len, dtype=torch.int64)
    positions = torch.arange(seq_len).repeat(sequences, 1)
    ids = torch.arange(sequences)
    targets = tokens[:, 1:].contiguous()
    targets[:, -1] = -100  # the peer shifts inside a row, and so has one target fewer
    return Batch(tokens[:, :-1].contiguous(), targets, zeros, positions, ids, sequences * (seq_len - 1))


def our_step(engine: Engine, batch: Batch, config: RunConfig, targets: int) -> Callable[[], None]:
    """One whole training step of ours."""

    def step() -> None:
        sums = engine.forward_backward([batch], targets)
        norm = engine.grad_norm()
        engine.apply(1e-3, config.optimizer.max_norm, torch.isfinite(norm) & torch.isfinite(sums.loss))

    return step


def peer_step(
    config: RunConfig, batch: Batch, *, compiled: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One whole training step of a transformers model with torch's fused AdamW: as fast as it comes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_config(config.model, family_of(config.model), None, str(dtype).removeprefix("torch."))
    kind = AutoConfig.for_model(values.pop("model_type"), **values)
    model: Any = AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa", dtype=dtype).to(device)
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        loss = forward(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def paired(ours: Callable[[], float], peer: Callable[[], float]) -> float:
    """Median of peer seconds / our seconds over PAIRS pairs, in turn first."""
    return saves.median_ratio(peer, ours, PAIRS)


def timed(step: Callable[[], None]) -> Callable[[], float]:
    """Seconds a step over about SECONDS_A_SIDE, after one that warms up (and compiles)."""
    step()
    began = time.perf_counter()
    step()
    count = max(2, round(SECONDS_A_SIDE / (time.perf_counter() - began)))

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - began) / count

    return measure


def one_process(shape: str, compiled: bool) -> float:
    """Ours against the peer in one process with all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = config_of(shape, compiled)
    batch = made_up_batch(config.model.vocab, SEQUENCES)
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        ours = timed(our_step(engine, batch.to(mesh.device), config, batch.target_count))
        return paired(ours, timed(peer_step(config, batch, compiled=compiled)))


def sharded_against_threads() -> float:
    """Two sharded ranks of one thread, on half the batch each, against one process with two threads on all of it."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "rendezvous")
        two = [_Side({"RANK": str(r), "WORLD_SIZE": "2", "MINKA_STORE": store}, 1, SEQUENCES // 2) for r in range(2)]
        one = [_Side({"RANK": "0", "WORLD_SIZE": "1"}, 2, SEQUENCES)]
        try:
            return paired(lambda: _go(two), lambda: _go(one))
        finally:
            for side in two + one:
                side.process.kill()
                side.process.join()


class _Side:
    """A process that holds a model and runs steps when told."""

    def __init__(self, place: dict[str, str], threads: int, sequences: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, place, threads, sequences), daemon=True)
        self.process.start()


def _serve(pipe: Connection, place: dict[str, str], threads: int, sequences: int) -> None:
    os.environ.update(place)
    torch.set_num_threads(threads)
    config = config_of("1M", compiled=False)
    config = config.model_copy(update={"layout": config.layout.model_copy(update={"micro_batch": sequences})})
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        batch = made_up_batch(config.model.vocab, sequences)
        step = our_step(engine, batch, config, batch.target_count * mesh.ranks)
        for _ in range(3):
            step()
        pipe.send("ready")
        while True:
            for _ in range(pipe.recv()):
                step()
            pipe.send("done")


def _go(sides: list[_Side], steps: int = 30) -> float:
    for side in sides:
        while side.pipe.poll(0):
            side.pipe.recv()  # "ready" of the first time
    began = time.perf_counter()
    for side in sides:
        side.pipe.send(steps)
    for side in sides:
        while side.pipe.recv() != "done":
            continue
    return (time.perf_counter() - began) / steps


def start_seconds() -> float:
    """From `minka train demo` to the end of its first step, data prepared on the way, less the import of torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    import_seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["run.max_steps=1", "schedule.warmup=0", "checkpoint.export=false", "eval.max_documents=1"]
        began_at = time.time()
        command = [sys.executable, "-m", "minka", "train", "demo", *overrides]
        subprocess.run(command, check=True, cwd=folder, capture_output=True, env=_environment())
        first = next(e for e in read_ledger(Path(folder) / "runs/demo/ledger.jsonl") if e["event"] == "step")
        return float(first["time"]) - began_at - import_seconds


def help_seconds() -> float:
    """CPU seconds of the slowest command's --help; the median of three runs of each."""
    worst = 0.0
    for command in ("train", "data", "eval", "export", "doctor"):
        runs = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            arguments = [sys.executable, "-m", "minka", command, "--help"]
            subprocess.run(arguments, check=True, capture_output=True, env=_environment())
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            runs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        worst = max(worst, statistics.median(runs))
    return worst


def _environment() -> dict[str, str]:
    source = Path(__file__).resolve().parent.parent / ".ns"
    return {**os.environ, "PYTHONPATH": str(source)} if source.exists() else dict(os.environ)


ROWS: dict[str, Callable[[], float]] = {
    "eager 1M against transformers": lambda: one_process("1M", compiled=False),
    "eager 20M against transformers": lambda: one_process("20M", compiled=False),
    "compiled 1M against transformers": lambda: one_process("1M", compiled=True),
    "compiled 20M against transformers": lambda: one_process("20M", compiled=True),
    "two sharded ranks against two threads": sharded_against_threads,
    "loader, samples of 2,048 a core": lambda: samples_per_second(synthetic_stream(1_000), rows=16),
    "start of the demo to its first step": start_seconds,
    "--help of the slowest command": help_seconds,
    **saves.ROWS,
}
BOUNDS: dict[str, tuple[float, bool, str]] = {
    "eager 1M against transformers": (1.15, True, "x"),
    "eager 20M against transformers": (1.05, True, "x"),
    "compiled 1M against transformers": (1.15, True, "x"),
    "compiled 20M against transformers": (1.05, True, "x"),
    "two sharded ranks against two threads": (0.97, True, "x"),
    "loader, samples of 2,048 a core": (20_000, True, "/s"),
    "start of the demo to its first step": (15.0, False, "s beyond the import of torch"),
    "--help of the slowest command": (0.5, False, "s of CPU time"),
    **saves.BOUNDS,
}

if __name__ == "__main__":
    sys.exit(main())
