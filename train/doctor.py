"""`minka doctor`: what is installed and which paths will run; with a recipe, the checks to make before paying for it.

The checklist follows Karpathy, "A recipe for training neural networks" (2019): data and gradients flow, the first loss
is that of guessing, one batch can be learnt by heart, and the learning rate is below the one that diverges (range
test: Smith 2017, arXiv:1506.01186).
"""

import importlib.metadata
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
from minka.model.attention import document_structure
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh, local_device, start_mesh
from minka.plan.cli import print_json, progress
from minka.plan.config import RunConfig
from minka.plan.config_sections import KernelsSection
from minka.plan.errors import ExitStatus, UserError
from minka.plan.flops import parameters
from minka.plan.hardware import find
from minka.plan.layout import Layout
from minka.train.build_engine import build_engine
from minka.train.final_summary import table
from minka.train.layer_stats import LayerStats
from minka.train.provenance import processor

PACKAGES = (
    "torch numpy triton transformers datasets tokenizers deepspeed flash-attn accelerate wandb tensorboard".split()
)
SEQUENCES = 4  # in the batch that the checks share
OVERFIT_NATS, OVERFIT_STEPS = 0.1, 600
RANGE_STEPS, RANGE_LOW, RANGE_HIGH = 60, 1e-5, 1.0
STATE_BYTES = 16  # fp32 weight, gradient and two moments, of each parameter


PATHS = {"mask": "torch's scaled_dot_product_attention with a document mask", "varlen": "torch's varlen_attn"}


class Check(NamedTuple):
    """One line of the checklist."""

    name: str
    passed: bool
    found: str


def examine(config: RunConfig | None, *, as_json: bool) -> int:
    """Print the machine, and the checklist when there is a recipe; exit status 1 when a check failed."""
    machine = this_machine(config)
    checks = list(checklist(config)) if config is not None else []
    good = all(check.passed for check in checks)
    if as_json:
        print_json({"machine": machine, "checks": [check._asdict() for check in checks], "passed": good})
    else:
        print(table(machine))
        if checks:
            print(table({f"{'ok ' if c.passed else 'NO '} {c.name}": c.found for c in checks}))
    return int(ExitStatus.DONE if good else ExitStatus.FAILED)


def this_machine(config: RunConfig | None) -> dict[str, str]:
    """What is here, and what minka will make of it."""
    device = local_device()
    found = {name: _version(name) for name in PACKAGES}
    rows = {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here",
        "GPUs": "none: minka trains on the CPU",
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = find(name)
        peak = f"{gpu.bf16_tflops:g} TFLOP/s bf16 ({gpu.source})" if gpu else "peak unknown, so no MFU"
        rows["GPUs"] = f"{torch.cuda.device_count()} x {name}, {peak}"
    rows |= {"packages": ", ".join(f"{name} {version}" for name, version in found.items() if version)}
    rows |= {"not installed": ", ".join(name for name, version in found.items() if not version) or "nothing"}
    kernels = config.kernels if config is not None else KernelsSection()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    two_documents = torch.tensor([[0, 1]], device=device)
    rows |= {
        "collectives": "nccl" if device.type == "cuda" else "gloo",
        "compute": f"{str(dtype).removeprefix('torch.')} on fp32 weights",
        "attention": PATHS[document_structure(two_documents, kernels, device=device, dtype=dtype).kind],
    }
    return rows


def checklist(config: RunConfig) -> Iterator[Check]:
    """The checks, in the order in which a failure explains the ones after it. One rank, one small batch."""
    _check_memory(config)
    store = open_or_prepare(config, Path(), progress)
    layout = Layout(micro_batch=1, recompute=config.layout.recompute, precision=config.layout.precision)
    one = config.model_copy(update={"layout": layout})
    with start_mesh(layout) as mesh:
        with Loader(one, store.split("train"), 0, 1, None, mesh.device) as loader:
            batch, _ = next(loader)
        part = _first(batch, SEQUENCES).to(mesh.device)
        share = part.target_count / part.targets.numel()
        yield Check("data flow", share > 0.5, f"{len(part.samples)} sequences, {100 * share:.0f} % of targets count")
        yield from _first_step(one, mesh, part)
        yield _overfits(one, mesh, part)
        yield _range_test(one, mesh, batch)


def _first_step(config: RunConfig, mesh: Mesh, batch: Batch) -> Iterator[Check]:
    engine, optimizer = build_engine(config, mesh)
    sums = engine.forward_backward([batch], batch.target_count)
    loss, guess = float(sums.loss) / batch.target_count, math.log(config.model.vocab)
    near = abs(loss - guess) < 0.1 * guess
    yield Check("first loss is that of guessing", near, f"{loss:.3f} nats, ln(vocab) is {guess:.3f}")
    dead = [
        name
        for name, (gradient, *_) in engine.gradient_pieces().items()
        if not (torch.isfinite(gradient).all() and gradient.abs().max() > 0)
    ]
    yield Check("gradients reach every weight", not dead, ", ".join(dead) or "all finite, none zero")
    engine.grad_norm()
    detail = LayerStats(engine, optimizer, mesh, config.model)
    detail.before_apply([batch])
    norms = detail.gradient_norms()
    blocks = [norm for name, norm in norms.items() if name.startswith("blocks.")]
    spread = max(blocks) / max(min(blocks), 1e-30)
    text = "  ".join(f"{name.removeprefix('blocks.')} {norm:.2g}" for name, norm in norms.items())
    yield Check("gradient norms by layer are alike", spread < 100, f"{text}  (largest / smallest block {spread:.1f})")


def _overfits(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    engine, _ = build_engine(config, mesh)
    best, rate = math.inf, config.optimizer.learning_rate
    with progress(OVERFIT_STEPS, "learning one batch by heart", "steps") as advance:
        for step in range(1, OVERFIT_STEPS + 1):
            best = min(best, _train_step(engine, config, batch, rate * min(1.0, step / 10)))
            advance(1)
            if best < OVERFIT_NATS:
                break
    return Check("one batch is overfitted", best < OVERFIT_NATS, f"{best:.3f} nats after {step} steps at lr {rate:.1e}")


def _range_test(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    """Raise the rate a little each step; the loss falls, then bursts. The run's rate should be below the burst."""
    engine, _ = build_engine(config, mesh)
    parts = [part.to(mesh.device) for part in batch.micro_batches(1)]
    losses, best, burst = [], math.inf, math.inf
    with progress(RANGE_STEPS, "learning-rate range test", "steps") as advance:
        for step in range(RANGE_STEPS):
            rate = RANGE_LOW * (RANGE_HIGH / RANGE_LOW) ** (step / (RANGE_STEPS - 1))
            part = parts[step % len(parts)]
            losses.append((rate, _train_step(engine, config, part, rate)))
            best = min(best, losses[-1][1])
            advance(1)
            if not math.isfinite(losses[-1][1]) or (step > 5 and losses[-1][1] > 1.5 * best):
                burst = rate
                break
    lowest = min((loss, rate) for rate, loss in losses if math.isfinite(loss))[1]
    rate = config.optimizer.learning_rate
    text = f"loss lowest at {lowest:.1e}, bursts at {burst:.1e}; the run uses {rate:.1e}"
    return Check("the learning rate is below the one that diverges", rate < burst, text)


def _train_step(engine: Engine, config: RunConfig, batch: Batch, rate: float) -> float:
    sums = engine.forward_backward([batch], batch.target_count)
    norm = engine.grad_norm()
    engine.apply(rate, config.optimizer.max_norm, torch.isfinite(norm))
    return float(sums.loss) / max(batch.target_count, 1)


def _first(batch: Batch, sequences: int) -> Batch:
    rows = len(batch.samples)
    return batch.micro_batches(sequences)[0] if rows % sequences == 0 else batch.micro_batches(1)[0]


def _check_memory(config: RunConfig) -> None:
    device = local_device()
    need = parameters(config.model) * STATE_BYTES
    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory_bytes()
    if need > have:
        raise UserError(
            f"the checks train the model on one device: {need / 2**30:,.0f} GiB of state, {have / 2**30:,.0f} GiB here",
            where="model",
            remedy="check a smaller model of the same family (model.layers=2), or run on a larger machine",
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
