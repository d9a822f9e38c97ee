"""The harness for law 2: a small model under any layout for a few steps, and how far that is from one process."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.data.batch import IGNORED, Batch
from minka.parallel.engine import Engine
from minka.parallel.inputs import ModelInputs
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan import execution_choices
from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.load_config import validate
from minka.plan.run_folder import RunFolder
from minka.plan.tensor_name import tensor_name
from minka.train.accept_step import accepts
from minka.train.build_engine import build_engine
from models import packed
from ranks import on_ranks
from tiny import train_rank

ROWS, LENGTH, VOCAB, STEPS = 8, 32, 256, 5
SHAPE = {"layers": 4, "d_model": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "d_ff": 96, "vocab": VOCAB}
# Relative, of a tensor in Frobenius norm. Gradients are those of the first step, weights and moments after the last.
BOUNDS = {"gradient": 2e-6, "loss": 2e-6, "grad_norm": 2e-5, "model": 2e-5, "moment1": 1e-4, "moment2": 1e-4}
BOUNDS |= {"evaluated": 2e-6, "logits": 2e-5}  # losses by place, and what follows a token
EXACT = dict.fromkeys(BOUNDS, 1e-10)
Fault = Callable[[], object] | None  # planted on each rank before it starts
Boxes = dict[str, tuple[NDArray[Any], tuple[int, ...], tuple[int, ...]]]


class Run(NamedTuple):
    """What is compared: by step, and whole tensors by kind and name ("gradient.blocks.0.mlp.up.weight")."""

    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    tensors: dict[str, NDArray[np.float64]]


def config_of(
    layout: Mapping[str, Any], model: Mapping[str, Any] | None = None, *, rows: int = ROWS, **sections: Any
) -> RunConfig:
    """A run of packed rows under `layout`: two micro-batches a rank, or one row at a time in a pipeline."""
    ways = layout.get("replicate", 1) * layout.get("shard", 1)
    micro_batch = 1 if layout.get("pipeline", 1) > 1 else rows // ways // 2
    values = {
        "run": {"name": "parity", "seed": 3, "max_steps": STEPS},
        "model": {**SHAPE, "z_loss": 1e-4, **(model or {})},
        "data": {"tokenizer": "bytes", "seq_len": LENGTH, "batch_tokens": rows * LENGTH},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-5, "max_norm": 0.5},
        "layout": {"shard": 1, "micro_batch": micro_batch, **layout},
    }
    return validate(values | sections, "tests/parity.py")


def run_on(config: RunConfig, fault: Fault = None, steps: int = STEPS) -> Run:
    """The run by the engine, on as many ranks as its layout has."""
    found = on_ranks(rank_of, config.layout.world, config, fault, steps)
    for rank, other in enumerate(found):
        assert other["loss"] == found[0]["loss"], f"losses of ranks 0 and {rank} differ"
        assert other["grad_norm"] == found[0]["grad_norm"], f"norms of ranks 0 and {rank} differ"
    whole = put_together([rank["pieces"] for rank in found])
    return Run(np.array(found[0]["loss"]), np.array(found[0]["grad_norm"]), whole)


def run_of_worker(config: RunConfig, fault: Fault = None) -> Run:
    """A run by the real worker on real data, from its ledger and its last checkpoint."""
    assert set(on_ranks(_worker, config.layout.world, config, fault)) == {0}
    folder = RunFolder.of(config)
    steps = [line for line in read_ledger(folder.ledger_file) if line["event"] == "step"]
    assert len(steps) == config.total_steps
    saved = whole_tensors(checkpoints(folder.checkpoints)[-1], "")
    tensors = {name: tensor.double().numpy() for name, tensor in saved if name != "rng.torch"}
    return Run(np.array([s["loss"] for s in steps]), np.array([s["grad_norm"] for s in steps]), tensors)


def _worker(config: RunConfig, fault: Fault) -> int:
    if fault is not None:
        fault()
    return train_rank(config)


def rank_of(config: RunConfig, fault: Fault, steps: int) -> dict[str, Any]:
    """One rank of `run_on`. Every block is a unit of FSDP's, as in larger models: else nothing would reshard."""
    units_of_one_block()
    if fault is not None:
        fault()
    losses, norms = [], []
    with start_mesh(config.layout, casts=config.optimizer.weights == "bf16") as mesh:
        engine, _ = build_engine(config, mesh)
        pieces = _boxes("initial.", {k: p for k, p in engine.tensors().items() if k.startswith("model.")})
        for step in range(steps):
            inputs, count = inputs_of(config, step, engine, mesh)
            sums = engine.forward_backward(inputs, count)
            if step == 0:
                pieces |= _boxes("gradient.", engine.gradient_pieces())
                # Between backward and update, as a run may: what it gathers must not outlive it.
                pieces |= _boxes("", evaluated(config, engine, mesh))
            norm = update(config, step, engine, accept=accepts(sums, engine.grad_norm()))
            losses.append(float(sums.loss) / count)
            norms.append(float(norm))
        pieces |= _boxes("", engine.tensors() if steps else {})
    return {"loss": losses, "grad_norm": norms, "pieces": pieces}


def units_of_one_block() -> None:
    """Make every block a unit of FSDP."""
    execution_choices.UNIT_BYTES = 1


def batch_of(config: RunConfig, step: int) -> Batch:
    """All packed rows of a step."""
    return packed_batch(config.data.batch_tokens // LENGTH, LENGTH, config.model.vocab, seed=step)


def packed_batch(rows: int, length: int, vocab: int, seed: int) -> Batch:
    """Rows of uneven documents, some of one token; a fifth of the targets is ignored."""
    tokens, documents, positions, targets = packed(rows, length, vocab, seed=seed)
    return Batch(tokens, targets, documents, positions, torch.arange(rows), int((targets != IGNORED).sum()))


def inputs_of(config: RunConfig, step: int, engine: Engine, mesh: Mesh) -> tuple[list[ModelInputs], int]:
    """This rank's micro-batches of a step (every so many rows are its own), and the targets of all ranks."""
    whole = batch_of(config, step)
    mine = whole.take(slice(mesh.data_rank, None, config.layout.data_ways))
    return [engine.prepare(part) for part in mine.micro_batches(config.layout.micro_batch)], whole.target_count


def update(config: RunConfig, step: int, engine: Engine, accept: torch.Tensor | bool = True) -> torch.Tensor:
    """The second half of a step, at a rate that rises; the gradient norm."""
    norm = engine.grad_norm()
    settings = config.optimizer
    engine.apply(settings.learning_rate * (step + 1) / STEPS, settings.max_norm, torch.as_tensor(accept))
    return norm


def evaluated(config: RunConfig, engine: Engine, mesh: Mesh) -> dict[str, Piece]:
    """Losses of the first step's rows by place, and what follows a token."""
    rows = batch_of(config, 0)
    losses = torch.zeros(rows.tokens.shape, dtype=torch.float64)
    for row in range(mesh.data_rank, len(losses), config.layout.data_ways):
        losses[row] += engine.token_losses(engine.prepare(rows.take(slice(row, row + 1))))[0].double()
    logits = engine.next_logits(rows.tokens[:1, :13], 9)
    return {"evaluated.losses": piece_of(mesh.sum_(losses)), "logits.next": piece_of(logits)}


def boxes_of(pieces: Mapping[str, Piece]) -> Boxes:
    """Pieces that can be sent: (local numbers, offset, global shape) by name."""
    return {name: (p.local.double().numpy().copy(), p.offset, p.global_shape) for name, p in pieces.items()}


def _boxes(prefix: str, pieces: Mapping[str, Piece]) -> Boxes:
    return {prefix + name: box for name, box in boxes_of(pieces).items()}


def put_together(ranks: list[Boxes]) -> dict[str, NDArray[np.float64]]:
    """Whole tensors; copies must be equal bit for bit."""
    whole: dict[str, NDArray[np.float64]] = {}
    for pieces in ranks:
        for key, (local, offset, shape) in pieces.items():
            name = tensor_name(key)  # a rank may have several boxes of a tensor
            into = whole.setdefault(name, np.full(shape, np.nan))
            box = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
            there = into[box]
            assert np.isnan(there).all() or np.array_equal(there, local) or name.startswith("gradient"), (
                f"{name}: copies differ"
            )
            into[box] = local
    for name, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{name} has numbers that no rank holds"
    return whole


def differences(one: Run, other: Run) -> dict[str, float]:
    """Worst relative difference by kind. Initial weights and counts must be equal bit for bit."""
    worst = {key: float(np.abs(getattr(one, key) / getattr(other, key) - 1).max()) for key in ("loss", "grad_norm")}
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        kind = name.split(".")[0]
        reference = other.tensors[name].reshape(tensor.shape)  # DeepSpeed's gradients are flat
        if kind in BOUNDS:
            error = float(np.linalg.norm(tensor - reference)) / max(float(np.linalg.norm(reference)), 1e-30)
            worst[kind] = float(np.maximum(worst.get(kind, 0.0), error))  # NaN stays
        else:  # where one process is in fp64, what the layout has is its rounding
            assert np.array_equal(tensor, reference) or np.array_equal(tensor, reference.astype(np.float32)), name
    return worst


def check(found: Mapping[str, float], title: str, bounds: Mapping[str, float] = BOUNDS) -> None:
    """Print the differences, and hold each of them to its bound."""
    print(f"{title}:", ", ".join(f"{kind} {error:.1e}" for kind, error in found.items()))
    for kind, error in found.items():
        assert error <= bounds[kind], (kind, title)
