"""`minka doctor`: what is installed and what will run here; with a recipe, also the checks to make before a run.

The checks follow Karpathy, "A recipe for training neural networks" (2019): data and gradients flow, the first loss is
that of uniform guessing, the model can overfit one batch, and the learning rate is below the one that diverges (range
test: Smith 2017, arXiv:1506.01186).
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

from minka.data.batch import Batch
from minka.data.loader import Loader
from minka.data.prepare import open_or_prepare
from minka.kernels.choose import Machine, choose
from minka.parallel.choose_kernels import work_of
from minka.parallel.local_device import local_device
from minka.parallel.mesh import DTYPES, Mesh, start_mesh
from minka.plan.atomic import write_text, writing
from minka.plan.cli import print_json, print_table, progress
from minka.plan.cluster import cluster_toml
from minka.plan.config import RunConfig
from minka.plan.config_sections import KernelsSection, ModelSection, OptimizerSection
from minka.plan.errors import ExitStatus, UserError
from minka.plan.execution_choices import compute_dtype_name
from minka.plan.flops import parameters
from minka.plan.hardware import find_gpu
from minka.plan.layout import Layout
from minka.train.build_engine import build_engine
from minka.train.layer_stats import layer_of, layers_of
from minka.train.measure_machine import measure_machine
from minka.train.provenance import processor, versions

PACKAGES = (
    "torch numpy triton transformers datasets tokenizers deepspeed flash-attn accelerate wandb tensorboard".split()
)
SEQUENCES = 4  # at most, in the batch that the checks share
OVERFIT_NATS, OVERFIT_STEPS = 0.1, 600
RANGE_STEPS, RANGE_LOW, RANGE_HIGH = 60, 1e-5, 1.0
# Shape whose kernels are shown without a recipe: Llama 3.1 8B's.
TYPICAL = ModelSection(layers=32, d_model=4096, heads=32, kv_heads=8, head_dim=128, d_ff=14336, vocab=128256)
STATE_BYTES = {"fp32": 8, "bf16": 4}  # per parameter: of weight and gradient, and of two moments
MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def write_machine(path: Path, *, as_json: bool) -> int:
    """Measure this machine's cores and write what a plan needs of them. Raises UserError."""
    cluster = measure_machine()
    with writing(path, "choose a different file (--machine)"):
        write_text(path, cluster_toml(cluster))
    found = {key: value for key, value in vars(cluster).items() if key != "rates"} | {"file": str(path)}
    if as_json:
        print_json(found)
    else:
        print_table([[key, f"{value:.4g}" if isinstance(value, float) else str(value)] for key, value in found.items()])
    return int(ExitStatus.DONE)


def this_machine(config: RunConfig | None) -> dict[str, str]:
    """Describe the machine, and what minka will use on it."""
    device = local_device()
    layout = config.layout if config is not None else Layout()
    optimizer = config.optimizer if config is not None else OptimizerSection(learning_rate=1e-3)
    dtype = compute_dtype_name(layout, device.type)
    gpus, collectives = "none: minka trains on the CPU", "gloo"
    if device.type == "cuda":
        name, collectives = torch.cuda.get_device_name(device), "nccl"
        gpu = find_gpu(name)
        peak = f"{gpu.bf16_tflops:g} TFLOP/s bf16 ({gpu.source})" if gpu else "peak unknown, so no MFU"
        gpus = f"{torch.cuda.device_count()} x {name}, {peak}"
    found = versions(*PACKAGES)
    kernels = config.kernels if config is not None else KernelsSection()
    section = config.model if config is not None else TYPICAL
    work = work_of(section, optimizer, kernels, layout, DTYPES[dtype])
    chosen = choose(kernels.asked(), Machine.of(device), work)
    warnings = {"warnings": ". ".join(chosen.fallbacks)} if chosen.fallbacks else {}
    stored = dict.fromkeys(("weights", "moments"), dtype) if dtype == "fp64" else optimizer.model_dump()
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{MEMORY_BYTES / 2**30:.1f} GiB",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here",
        "GPUs": gpus,
        "packages": ", ".join(f"{name} {version}" for name, version in found.items() if version),
        "not installed": ", ".join(name for name, version in found.items() if not version) or "nothing",
        "collectives": collectives,
        "compute": f"{dtype} on {stored['weights']} weights, {stored['moments']} moments",
        **{name: f"{way} ({chosen.reasons[name]})" for name, way in chosen.ways().items()},
        **warnings,
    }


def run_checks(config: RunConfig) -> Iterator[Check]:
    """Run the checks on one rank with one small batch, in the order in which a failure explains later ones."""
    device, stored = local_device(), config.optimizer
    need = parameters(config.model) * (STATE_BYTES[stored.weights] + STATE_BYTES[stored.moments])
    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else MEMORY_BYTES
    if need > have:
        raise UserError(
            f"the model needs {need / 2**30:,.0f} GiB of state, and this device has {have / 2**30:,.0f} GiB",
            where="model",
            remedy="check a smaller model of the same family (model.layers=2), or use a larger machine",
        )
    store = open_or_prepare(config, Path(), progress)
    layout = Layout(micro_batch=1, recompute=config.layout.recompute, precision=config.layout.precision)
    config = config.model_copy(update={"layout": layout})
    with start_mesh(layout, casts=stored.weights == "bf16") as mesh:
        with Loader(config, store.split("train"), 0, 1) as loader:
            batch = next(loader).batch
        few = batch.micro_batches(math.gcd(len(batch.samples), SEQUENCES))[0]
        share = few.target_count / few.targets.numel()
        yield Check("data flow", share > 0.5, f"{len(few.samples)} sequences, {100 * share:.0f} % of targets count")
        yield from _first_step(config, mesh, few)
        yield _overfit(config, mesh, few)
        yield _range_test(config, mesh, batch)


def _first_step(config: RunConfig, mesh: Mesh, batch: Batch) -> Iterator[Check]:
    engine, _ = build_engine(config, mesh)
    sums = engine.forward_backward([engine.prepare(batch)], batch.target_count)
    loss, uniform = float(sums.loss) / batch.target_count, math.log(config.model.vocab)
    near = abs(loss - uniform) < 0.1 * uniform
    yield Check("first loss is that of uniform guessing", near, f"{loss:.3f} nats, ln(vocab) is {uniform:.3f}")
    gradients = {name: piece.local for name, piece in engine.gradient_pieces().items()}
    dead = [name for name, gradient in gradients.items() if not (gradient.isfinite().all() and gradient.any())]
    yield Check("gradients reach every weight", not dead, ", ".join(dead) or "all finite, none zero")
    squares = dict.fromkeys(layers_of(config.model), 0.0)
    for name, gradient in gradients.items():
        squares[layer_of(name)] += float(gradient.double().square().sum())
    norms = {layer: square**0.5 for layer, square in squares.items()}
    blocks = [norm for name, norm in norms.items() if name.startswith("blocks.")]
    ratio = max(blocks) / max(min(blocks), 1e-30)
    text = "  ".join(f"{name.removeprefix('blocks.')} {norm:.2g}" for name, norm in norms.items())
    found = f"{text}  (largest / smallest block {ratio:.1f})"
    yield Check("gradient norms of the blocks are within a factor of 100", ratio < 100, found)


def _overfit(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    rate, losses = config.optimizer.learning_rate, []
    rates = [rate * min(1.0, step / 10) for step in range(1, OVERFIT_STEPS + 1)]
    for loss in _losses(config, mesh, [batch], rates, "overfitting one batch"):
        losses.append(loss)
        if loss < OVERFIT_NATS:
            break
    found = f"{min(losses):.3f} nats after {len(losses)} steps at lr {rate:.1e}"
    return Check("one batch is overfitted", loss < OVERFIT_NATS, found)


def _range_test(config: RunConfig, mesh: Mesh, batch: Batch) -> Check:
    """Raise the learning rate each step until the loss diverges. The run's rate should be below that point."""
    parts = batch.micro_batches(1)
    growth = (RANGE_HIGH / RANGE_LOW) ** (1 / (RANGE_STEPS - 1))
    rates = [RANGE_LOW * growth**step for step in range(RANGE_STEPS)]
    best, best_rate, diverges = math.inf, RANGE_LOW, math.inf
    for step, loss in enumerate(_losses(config, mesh, parts, rates, "learning-rate range test")):
        if loss < best:
            best, best_rate = loss, rates[step]
        if not math.isfinite(loss) or (step > 5 and loss > 1.5 * best):
            diverges = rates[step]
            break
    rate = config.optimizer.learning_rate
    found = f"loss lowest at {best_rate:.1e}, diverges at {diverges:.1e}; the run uses {rate:.1e}"
    return Check("the learning rate is below the one that diverges", rate < diverges, found)


def _losses(
    config: RunConfig, mesh: Mesh, batches: Sequence[Batch], rates: Sequence[float], what: str
) -> Iterator[float]:
    """Train the model on `batches` in turn, one step at each of `rates`. Yields the loss before each update."""
    engine, _ = build_engine(config, mesh)
    with progress(len(rates), what, "steps") as advance:
        for batch, rate in zip(cycle(batches), rates, strict=False):
            sums = engine.forward_backward([engine.prepare(batch)], batch.target_count)
            norm = engine.grad_norm()
            engine.apply(rate, config.optimizer.max_norm, torch.isfinite(norm))
            advance(1)
            yield float(sums.loss) / max(batch.target_count, 1)
