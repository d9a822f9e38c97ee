"""A few steps of a small model under any layout, and how far they are from one process: what law 2 is measured with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minka.parallel import fsdp as shard
from minka.parallel.mesh import start_mesh
from minka.parallel.pieces import Piece, piece_of, tensor_name
from minka.plan.config import RunConfig
from minka.plan.load_config import validate
from minka.train.build_engine import build_engine
from minka.train.guard import accepts
from models import packed
from ranks import on_ranks

ROWS, LENGTH, VOCAB, STEPS = 8, 32, 256, 5
SHAPE = {"layers": 4, "d_model": 64, "heads": 8, "kv_heads": 4, "head_dim": 8, "d_ff": 96, "vocab": VOCAB}
# Relative, of a tensor in Frobenius norm. Gradients are those of the first step, weights and moments after the last.
BOUNDS = {"gradient": 2e-6, "loss": 2e-6, "grad_norm": 2e-5, "model": 2e-5, "moment1": 1e-4, "moment2": 1e-4}
BOUNDS |= {"evaluated": 2e-6, "logits": 2e-5}  # losses by place, and what follows a token
EXACT = dict.fromkeys(BOUNDS, 1e-10)


class Fed(NamedTuple):
    """A micro-batch of packed rows."""

    tokens: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


class Run(NamedTuple):
    """What is compared: by step, and whole tensors by kind and name ("gradient.blocks.0.mlp.up.weight")."""

    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    tensors: dict[str, NDArray[np.float64]]


def config_of(layout: Mapping[str, Any], model: Mapping[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A run of packed rows under `layout`, eight of them a step, two micro-batches a rank or eight in a pipeline."""
    ways = layout.get("replicate", 1) * layout.get("shard", 1)
    micro_batch = 1 if layout.get("pipeline", 1) > 1 else ROWS // ways // 2
    values = {
        "run": {"name": "parity", "seed": 3, "max_steps": STEPS},
        "model": {**SHAPE, "z_loss": 1e-4, **(model or {})},
        "data": {"tokenizer": "bytes", "seq_len": LENGTH, "batch_tokens": ROWS * LENGTH},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-5, "max_norm": 0.5},
        "layout": {"shard": 1, "micro_batch": micro_batch, **layout},
    }
    return validate(values | sections, "tests/parity.py")


def run_on(
    config: RunConfig, fault: Callable[[], object] | None = None, steps: int = STEPS, seconds: float = 120
) -> Run:
    """The run on as many ranks as its layout has; `fault` is planted on each of them first."""
    found = on_ranks(rank_of, config.layout.world, config, fault, steps, seconds=seconds)
    for rank, other in enumerate(found):
        assert other["loss"] == found[0]["loss"], f"losses of ranks 0 and {rank} differ"
        assert other["grad_norm"] == found[0]["grad_norm"], f"norms of ranks 0 and {rank} differ"
    whole = put_together([rank["pieces"] for rank in found])
    return Run(np.array(found[0]["loss"]), np.array(found[0]["grad_norm"]), whole)


def rank_of(config: RunConfig, fault: Callable[[], object] | None, steps: int) -> dict[str, Any]:
    """One rank of it. Every block is a unit of FSDP's, as in models that are worth cutting: else nothing reshards."""
    shard.UNIT_BYTES = 1
    if fault is not None:
        fault()
    losses, norms, pieces = [], [], {}
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        evaluated, logits = torch.zeros(ROWS, LENGTH, dtype=torch.float64), torch.zeros(VOCAB)
        for step in range(steps):
            mine = micro_batches(config, step, mesh.data_rank)
            count = sum(int((part.targets != -100).sum()) for part in every(step, 1))
            sums = engine.forward_backward(mine, count)
            norm = engine.grad_norm()
            if step == 0:
                pieces = {f"gradient.{name}": plain(piece) for name, piece in engine.gradient_pieces().items()}
                # Between backward and update, as a run may: what it gathers must not outlive it.
                for index, part in enumerate(whole_micro_batches(config, step, mesh.data_rank)):
                    evaluated[index * config.layout.data_ways + mesh.data_rank] += engine.token_losses(part)[0].double()
                logits = engine.next_logits(every(step, 1)[0].tokens[:, :13], 9)
            engine.apply(config.optimizer.learning_rate, config.optimizer.max_norm, accepts(sums, norm))
            losses.append(float(sums.loss) / count)
            norms.append(float(norm))
        pieces |= {name: plain(piece) for name, piece in engine.tensors().items()}
        pieces |= {"evaluated.losses": plain(piece_of(mesh.sum_(evaluated))), "logits.next": plain(piece_of(logits))}
    return {"loss": losses, "grad_norm": norms, "pieces": pieces}


def every(step: int, size: int) -> list[Fed]:
    """All rows of a step, `size` at once."""
    rows = packed(ROWS, LENGTH, VOCAB, seed=step)
    return [Fed(*(tensor[first : first + size] for tensor in rows)) for first in range(0, ROWS, size)]


def micro_batches(config: RunConfig, step: int, data_rank: int) -> list[Fed]:
    """A data rank's rows, every so manieth of all."""
    ways, size = config.layout.data_ways, config.layout.micro_batch
    rows = packed(ROWS, LENGTH, VOCAB, seed=step)
    mine = [tensor[data_rank::ways] for tensor in rows]
    return [Fed(*(tensor[first : first + size] for tensor in mine)) for first in range(0, ROWS // ways, size)]


def whole_micro_batches(config: RunConfig, step: int, data_rank: int) -> list[Fed]:
    """A data rank's rows, one at a time."""
    return every(step, 1)[data_rank :: config.layout.data_ways]


def plain(piece: Piece) -> tuple[NDArray[Any], tuple[int, ...], tuple[int, ...]]:
    """A piece that can be sent: (local numbers, offset, global shape)."""
    return piece.local.double().numpy().copy(), piece.offset, piece.global_shape


def put_together(ranks: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
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
    """Worst relative difference by kind."""
    worst = {
        "loss": float(np.abs(one.loss / other.loss - 1).max()),
        "grad_norm": float(np.abs(one.grad_norm / other.grad_norm - 1).max()),
    }
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        kind = name.split(".")[0]
        if kind in BOUNDS:
            reference = other.tensors[name].reshape(tensor.shape)  # DeepSpeed's gradients are flat
            error = float(np.linalg.norm(tensor - reference)) / max(float(np.linalg.norm(reference)), 1e-30)
            worst[kind] = float(np.maximum(worst.get(kind, 0.0), error))  # NaN stays
    return worst
