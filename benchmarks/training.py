"""`make bench`: speed against a peer in the same minute, as ratios. Absolute times depend on the machine.

Each pair runs our step and the peer's, and each goes first in turn. A figure is the median of the pairs' ratios.
"""

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
from typing import Any

import torch

from minka.benchmarks import checkpoints
from minka.benchmarks.claims import Claim, check_claims, median_ratio
from minka.benchmarks.data_path import samples_per_second, synthetic_stream
from minka.data.batch import Batch
from minka.parallel.engine import Engine
from minka.parallel.mesh import start_mesh
from minka.plan.config import RunConfig
from minka.plan.hub_config import to_config
from minka.plan.ledger import read_ledger
from minka.plan.load_config import validate
from minka.train.build_engine import build_engine

PAIRS = 5
SEQUENCES, SEQ_LEN = 16, 256
SHAPES: dict[str, dict[str, int]] = {
    "1M": {"layers": 4, "d_model": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "d_ff": 384, "vocab": 2048},
    "20M": {"layers": 8, "d_model": 384, "heads": 6, "kv_heads": 2, "head_dim": 64, "d_ff": 1024, "vocab": 8192},
}
SECONDS_A_SIDE = 3.0


def main() -> int:
    """Check the claims whose name contains --only (default: all). Return 1 when a bound is broken."""
    return check_claims("Speed against a peer, as ratios.", CLAIMS)


def config_of(shape: str, compiled: bool, folder: str = "bench") -> RunConfig:
    """Return a run of one of SHAPES. Its batches are synthetic, and nothing touches the disk."""
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


def synthetic_batch(vocab: int, sequences: int, seq_len: int = SEQ_LEN) -> Batch:
    """Return random tokens, one document a row, which a plain causal model can train on, too."""
    tokens = torch.randint(vocab, (sequences, seq_len + 1), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(sequences, seq_len, dtype=torch.int64)
    positions = torch.arange(seq_len).repeat(sequences, 1)
    ids = torch.arange(sequences)
    targets = tokens[:, 1:].contiguous()
    targets[:, -1] = -100  # the peer shifts inside a row and has one target fewer
    return Batch(tokens[:, :-1].contiguous(), targets, zeros, positions, ids, sequences * (seq_len - 1))


def our_step(engine: Engine, batch: Batch, config: RunConfig, targets: int) -> Callable[[], None]:
    """Return one whole training step of minka."""

    def step() -> None:
        sums = engine.forward_backward([engine.prepare(batch)], targets)
        norm = engine.grad_norm()
        engine.apply(1e-3, config.optimizer.max_norm, torch.isfinite(norm) & torch.isfinite(sums.loss))

    return step


def peer_step(
    config: RunConfig,
    batch: Batch,
    *,
    compiled: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> Callable[[], None]:
    """Return one whole training step of a transformers model with torch's fused AdamW. recompute: every block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_config(config.model, "auto", None, str(dtype).removeprefix("torch."))
    kind = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):  # on a host, the weights of 8 billion take minutes
        model: Any = AutoModelForCausalLM.from_config(kind, attn_implementation="sdpa", dtype=dtype)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = torch.compile(model) if compiled else model
    tokens = batch.tokens.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_ratio(ours: Callable[[], float], peer: Callable[[], float]) -> float:
    """Return the median of peer seconds / our seconds over PAIRS pairs."""
    return median_ratio(peer, ours, PAIRS)


def timed(step: Callable[[], None]) -> Callable[[], float]:
    """Return a function that measures seconds a step over about SECONDS_A_SIDE. Warms up (and compiles) first."""
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
    """Compare minka with the peer in one process on all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = config_of(shape, compiled)
    batch = synthetic_batch(config.model.vocab, SEQUENCES)
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        ours = timed(our_step(engine, batch, config, batch.target_count))
        return peer_ratio(ours, timed(peer_step(config, batch, compiled=compiled)))


def sharded_against_threads() -> float:
    """Compare two sharded ranks of one thread, on half the batch each, with one process of two threads on all of it."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "rendezvous")
        two = [_Worker({"RANK": str(r), "WORLD_SIZE": "2", "MINKA_STORE": store}, 1, SEQUENCES // 2) for r in range(2)]
        one = [_Worker({"RANK": "0", "WORLD_SIZE": "1"}, 2, SEQUENCES)]
        try:
            return peer_ratio(lambda: _seconds_per_step(two), lambda: _seconds_per_step(one))
        finally:
            for worker in two + one:
                worker.process.kill()
                worker.process.join()


class _Worker:
    """A process that holds a model and runs the number of steps it is sent."""

    def __init__(self, environment: dict[str, str], threads: int, sequences: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, environment, threads, sequences), daemon=True)
        self.process.start()


def _serve(pipe: Connection, environment: dict[str, str], threads: int, sequences: int) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    config = config_of("1M", compiled=False)
    config = config.model_copy(update={"layout": config.layout.model_copy(update={"micro_batch": sequences})})
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        batch = synthetic_batch(config.model.vocab, sequences)
        step = our_step(engine, batch, config, batch.target_count * mesh.ranks)
        for _ in range(3):
            step()
        pipe.send("ready")
        while True:
            for _ in range(pipe.recv()):
                step()
            pipe.send("done")


def _seconds_per_step(workers: list[_Worker], steps: int = 30) -> float:
    for worker in workers:
        while worker.pipe.poll(0):
            worker.pipe.recv()  # "ready" of the first time
    began = time.perf_counter()
    for worker in workers:
        worker.pipe.send(steps)
    for worker in workers:
        while worker.pipe.recv() != "done":
            continue
    return (time.perf_counter() - began) / steps


def loader_samples_per_second() -> float:
    """Return the samples that one core packs into batches in a second."""
    return samples_per_second(synthetic_stream(1_000), rows=16)


def start_seconds() -> float:
    """Return the seconds from `minka train demo` to the end of its first step, less the import of torch.

    This includes the preparation of the data.
    """
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
    """Return the CPU seconds of the slowest command's --help, as the median of three runs of each."""
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


CLAIMS = (
    Claim("eager 1M against transformers", lambda: one_process("1M", compiled=False), 1.15, "x", True),
    Claim("eager 20M against transformers", lambda: one_process("20M", compiled=False), 1.05, "x", True),
    Claim("compiled 1M against transformers", lambda: one_process("1M", compiled=True), 1.15, "x", True),
    Claim("compiled 20M against transformers", lambda: one_process("20M", compiled=True), 1.05, "x", True),
    Claim("two sharded ranks against two threads", sharded_against_threads, 0.97, "x", True),
    Claim("loader, samples of 2,048 tokens on a core", loader_samples_per_second, 20_000, "/s", True),
    Claim("start of the demo to its first step", start_seconds, 15.0, "s beyond the import of torch"),
    Claim("--help of the slowest command", help_seconds, 0.5, "s of CPU time"),
    *checkpoints.CLAIMS,
)

if __name__ == "__main__":
    sys.exit(main())
