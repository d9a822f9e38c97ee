"""A few steps of a tiny model on made-up rows, by any engine on any number of ranks, and how two such runs differ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minka.checkpoint.restore import checkpoints, whole_tensors
from minka.data.batch import IGNORED, Batch
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, tensor_name
from minka.plan.config import RunConfig
from minka.train.build_engine import build_engine
from tiny import tiny

ROWS, LENGTH, STEPS, RATE, NORM = 12, 32, 5, 3e-3, 0.05  # every gradient is clipped
BOUNDS = {"gradient": 2e-6, "loss": 2e-6, "norm": 2e-5, "model": 2e-5, "moment1": 1e-4, "moment2": 1e-4}
# Odd sizes: a cut of the flattened weights falls within a row.
MODEL = {"d_model": 30, "head_dim": 6, "heads": 5, "kv_heads": 1, "d_ff": 71, "vocab": 256, "z_loss": 1e-4}
Boxes = list[tuple[str, NDArray[Any], tuple[int, ...], tuple[int, ...]]]


def configured(folder: Path, model: Any = None, **layout: Any) -> RunConfig:
    """The odd model under a layout."""
    return tiny(folder, model={**MODEL, **(model or {})}, layout={"micro_batch": 2, **layout})


def global_batch(step: int) -> Batch:
    """Rows of documents of 1 to 32 tokens; the last rows have many ignored targets."""
    dice = np.random.default_rng(step)
    tokens = dice.integers(0, 256, (ROWS, LENGTH + 1))
    documents, positions = np.zeros((ROWS, LENGTH), int), np.zeros((ROWS, LENGTH), int)
    for row in range(ROWS):
        cuts = {0, *dice.integers(1, LENGTH, dice.integers(0, 5)).tolist()}
        for at in range(LENGTH):
            documents[row, at] = sum(cut <= at for cut in cuts) - 1
            positions[row, at] = at - max(cut for cut in cuts if cut <= at)
    targets = tokens[:, 1:].copy()
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORED
    targets[ROWS // 2 :, : LENGTH // 2] = IGNORED
    count = int((targets != IGNORED).sum())
    ids, as_tensor = torch.arange(ROWS), torch.from_numpy
    inputs = as_tensor(tokens[:, :-1].copy()), as_tensor(targets), as_tensor(documents), as_tensor(positions)
    return Batch(*inputs, ids, count)


def micro_batches(step: int, mesh: Mesh, accumulate: int = 2) -> tuple[list[Batch], int]:
    """This rank's rows of a step in so many micro-batches, and the targets of all ranks."""
    whole = global_batch(step)
    per_rank = ROWS // mesh.ranks
    mine = whole.micro_batches(per_rank)[mesh.rank] if mesh.ranks > 1 else whole
    return [part.to(mesh.device) for part in mine.micro_batches(per_rank // accumulate)], whole.target_count


def trained(config: RunConfig) -> dict[str, Any]:
    """Numbers of a few steps of one rank, and its boxes of the first gradients and of the last state."""
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        found: dict[str, Any] = {"loss": [], "norm": [], "initial": boxes_of(engine.tensors())}
        for step in range(STEPS):
            parts, targets = micro_batches(step, mesh)
            sums = engine.forward_backward(parts, targets)
            if step == 0:
                found["gradient"] = boxes_of(engine.gradient_pieces())
            norm = take(engine, step)
            found["loss"].append(float(sums.loss) / targets)
            found["norm"].append(float(norm))
        found["tensors"] = boxes_of(engine.tensors())
        return found


def take(engine: Any, step: int, accept: bool = True) -> Tensor:
    """The second half of a step; the gradient norm."""
    norm: Tensor = engine.grad_norm()
    engine.apply(RATE * (step + 1) / STEPS, NORM, torch.isfinite(norm) & torch.tensor(accept, device=norm.device))
    return norm


def boxes_of(pieces: dict[str, Piece]) -> Boxes:
    """Pieces as they go between processes, by the names of their tensors."""
    return [(tensor_name(k), p.local.float().numpy().copy(), p.offset, p.global_shape) for k, p in pieces.items()]


def together(ranks: list[Boxes]) -> dict[str, NDArray[Any]]:
    """Whole tensors out of the boxes of all ranks; every element is somebody's."""
    whole: dict[str, NDArray[Any]] = {}
    for mine in ranks:
        for name, local, offset, shape in mine:
            into = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            into[tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))] = local
    assert not any(np.isnan(tensor).any() for tensor in whole.values())
    return whole


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """Worst relative difference of losses and norms on any rank; of tensors, by kind, in relative Frobenius norm."""
    errors = {}
    for key in ("loss", "norm"):
        errors[key] = max(float(np.abs(np.array(f[key]) / np.array(expected[0][key]) - 1).max()) for f in found)
    for what in ("gradient", "tensors"):
        theirs = together([f[what] for f in expected])
        for name, mine in together([f[what] for f in found]).items():
            kind, reference = what if what == "gradient" else name.split(".")[0], theirs[name].reshape(mine.shape)
            if kind in BOUNDS:
                size = max(float(np.linalg.norm(reference)), 1e-30)
                error = float(np.linalg.norm(mine.astype(float) - reference)) / size
                errors[kind] = max(errors.get(kind, 0.0), error)
            else:
                assert np.array_equal(mine, reference)
    return errors


def read(folder: Path) -> dict[str, NDArray[Any]]:
    """All tensors of the newest checkpoint."""
    return {name: tensor.numpy() for name, tensor in whole_tensors(checkpoints(folder)[-1], "")}


def same(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(tensor, other[name]) for name, tensor in one.items())
