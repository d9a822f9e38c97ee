"""`minka doctor`: what is installed and what will run here; with a recipe, also the checks to make before a run.

The checks follow Karpathy, "A recipe for training neural networks" (2019): data and gradients flow, the first loss is
that of uniform guessing, the model can overfit one batch, and the learning rate is below the one that diverges (range
test: Smith 2017, arXiv:1506.01186).
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from minka.data.batch import Batch
from minka.data.loader import Loader
from minka.data.prepare import open_or_prepare
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh, local_device, start_mesh
from minka.plan.cli import print_json, print_table, progress
from minka.plan.config import RunConfig
from minka.plan.config_sections import KernelsSection
from minka.plan.errors import ExitStatus, UserError
from minka.plan.flops import parameters
from minka.plan.hardware import find
from minka.plan.layout import Layout
from minka.plan.sizing import attention_kind
from minka.train.build_engine import build_engine
from minka.train.layer_stats import LayerStats
from minka.train.provenance import processor, versions

PACKAGES = (
    "torch numpy triton transformers datasets tokenizers deepspeed flash-attn accelerate wandb tensorboard".split()
)
SEQUENCES = 4  # at most, in the batch that the checks share
OVERFIT_NATS, OVERFIT_STEPS = 0.1, 600
RANGE_STEPS, RANGE_LOW, RANGE_HIGH = 60, 1e-5, 1.0
STATE_BYTES = 16  # per parameter: fp32 weight, gradient and two moments
ATTENTION = {"mask": "torch's scaled_dot_product_attention with a document mask", "varlen": "torch's varlen_attn"}


class Check(NamedTuple):
    """One row of the table of checks."""

    name: str
    passed: bool
    found: str


def examine(config: RunConfig | None, *, as_json: bool) -> int:
    """Print the machine, and with a recipe its checks. Return exit status 1 when a check failed."""
    machine = this_machine(config)
    checks = list(run_checks(config)) if config is not None else []
    passed = all(check.passed for check in checks)
    if as_json:
        print_json({"machine": machine, "checks": [check._asdict() for check in checks], "passed": passed})
    else:
        print_table(list(machine.items()))
        if checks:
            rows = [("ok" if check.passed else "FAILED", check.name, check.found) for check in checks]
            print_table(rows, ("", "check", "found"))
    return int(ExitStatus.DONE if passed else ExitStatus.FAILED)


def this_machine(config: RunConfig | None) -> dict[str, str]:
    """Describe the machine, and what minka will use on it."""
    device = local_device()
    on_gpu = device.type == "cuda"
    gpus = "none: minka trains on the CPU"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        gpu = find(name)
        peak = f"{gpu.bf16_tflops:g} TFLOP/s bf16 ({gpu.source})" if gpu else "peak unknown, so no MFU"
        gpus = f"{torch.cuda.device_count()} x {name}, {peak}"
    found = versions(*PACKAGES)
    kernels = config.kernels if config is not None else KernelsSection()
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here",
        "GPUs": gpus,
        "packages": ", ".join(f"{name} {version}" for name, version in found.items() if version),
        "not installed": ", ".join(name for name, version in found.items() if not version) or "nothing",
        "collectives": "nccl" if on_gpu else "gloo",
        "compute": f"{'bfloat16' if on_gpu else 'float32'} on fp32 weights",
        "attention": ATTENTION[attention_kind(kernels.attention, device.type, "bf16" if on_gpu else "fp32")],
    }


def run_checks(config: RunConfig) -> Iterator[Check]:
    """Run the checks on one rank with one small batch, in the order in which a failure explains later ones."""
    _check_memory(config)
    store = open_or_prepare(config, Path(), progress)
    layout = Layout(micro_batch=1, recompute=config.layout.recompute, precision=config.layout.precision)
    config = config.model_copy(update={"layout": layout})
    with start_mesh(layout) as mesh:
        with Loader(config, store.split("train"), 0, 1) as loader:
            batch = next(loader).batch
        few = batch.micro_batches(math.gcd(len(batch.samples), SEQUENCES))[0]
        share = few.target_count / few.targets.numel()
        yield Check("data flow", share > 0.5, f"{len(few.samples)} sequences, {100 * share:.0f} % of targets count")
        yield from _first_step(config, mesh, few)
        yield _overfit(config, mesh, few)
        yield _range_test(config, mesh, batch)


def _first_step(config: RunConfig, mesh: Mesh, batch: Batch) -> Iterator[Check]:
    engine, optimizer = build_engine(config, mesh)
    sums = engine.forward_backward([engine.prepare(batch)], batch.target_count)
    loss, uniform = float(sums.loss) / batch.target_count, math.log(config.model.vocab)
    near = abs(loss - uniform) < 0.1 * uniform
    yield Check("first loss is that of uniform guessing", near, f"{loss:.3f} nats, ln(vocab) is {uniform:.3f}")
    dead = [
        name
        for name, (gradient, *_) in engine.gradient_pieces().items()
        if not (torch.isfinite(gradient).all() and gradient.abs().max() > 0)
    ]
    yield Check("gradients reach every weight", not dead, ", ".join(dead) or "all finite, none zero")
    engine.grad_norm()
    stats = LayerStats(engine, optimizer, mesh, config.model)
    stats.before_apply(batch, len(batch.samples))
    norms = stats.gradient_norms()
    blocks = [norm for name, norm in norms.items() if name.startswith("blocks.")]
    ratio = max(blocks) / max(min(blocks), 1e-30)
    text = "  ".join(f"{name.removeprefix('blocks.')} {norm:.2g}" for name, norm in norms.items())
    found = f"{text}  (largest / smallest block {ratio:.1f})"
    yield Check("gradient norms of the blocks are within a factor of 100", ratio < 100, found)


def _overfit(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    engine, _ = build_engine(config, mesh)
    best, rate = math.inf, config.optimizer.learning_rate
    with progress(OVERFIT_STEPS, "overfitting one batch", "steps") as advance:
        for step in range(1, OVERFIT_STEPS + 1):
            best = min(best, _train_step(engine, config, batch, rate * min(1.0, step / 10)))
            advance(1)
            if best < OVERFIT_NATS:
                break
    return Check("one batch is overfitted", best < OVERFIT_NATS, f"{best:.3f} nats after {step} steps at lr {rate:.1e}")


def _range_test(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    """Raise the learning rate each step until the loss diverges. The run's rate should be below that point."""
    engine, _ = build_engine(config, mesh)
    parts = batch.micro_batches(1)
    best, best_rate, diverges = math.inf, RANGE_LOW, math.inf
    with progress(RANGE_STEPS, "learning-rate range test", "steps") as advance:
        for step in range(RANGE_STEPS):
            rate = RANGE_LOW * (RANGE_HIGH / RANGE_LOW) ** (step / (RANGE_STEPS - 1))
            loss = _train_step(engine, config, parts[step % len(parts)], rate)
            advance(1)
            if loss < best:
                best, best_rate = loss, rate
            if not math.isfinite(loss) or (step > 5 and loss > 1.5 * best):
                diverges = rate
                break
    rate = config.optimizer.learning_rate
    found = f"loss lowest at {best_rate:.1e}, diverges at {diverges:.1e}; the run uses {rate:.1e}"
    return Check("the learning rate is below the one that diverges", rate < diverges, found)


def _train_step(engine: Engine, config: RunConfig, batch: Batch, rate: float) -> float:
    sums = engine.forward_backward([engine.prepare(batch)], batch.target_count)
    norm = engine.grad_norm()
    engine.apply(rate, config.optimizer.max_norm, torch.isfinite(norm))
    return float(sums.loss) / max(batch.target_count, 1)


def _check_memory(config: RunConfig) -> None:
    device = local_device()
    need = parameters(config.model) * STATE_BYTES
    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory_bytes()
    if need > have:
        raise UserError(
            f"the model needs {need / 2**30:,.0f} GiB of state, and this device has {have / 2**30:,.0f} GiB",
            where="model",
            why="the checks train the model on one device",
            remedy="check a smaller model of the same family (model.layers=2), or use a larger machine",
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
