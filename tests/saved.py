"""Checkpoints that nobody trained: a few tensors, or a run as `minka eval` and `minka export` find it."""

from pathlib import Path
from typing import Any

import torch

from minka.data.prepare import open_or_prepare
from minka.parallel.apply import build_model
from minka.parallel.checkpoint import save
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, piece_of
from minka.plan.layout import Layout
from minka.plan.run import RunFolder
from tiny import tiny

ALONE = Mesh(Layout(shard=1), torch.device("cpu"), 0, None)


def tensors(seed: int = 0) -> dict[str, Piece]:
    """A matrix, a vector and a scalar, each in one piece."""
    generator = torch.Generator().manual_seed(seed)
    made = {"model.w": torch.randn(7, 3, generator=generator), "model.b": torch.randn(5, generator=generator)}
    return {name: piece_of(tensor) for name, tensor in (made | {"count": torch.tensor(float(seed))}).items()}


def silent(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} was passed over: {reason}")


def saved_run(folder: Path, *steps: int, **sections: Any) -> RunFolder:
    """The run of `tiny` under `folder` with its initial weights saved at each of `steps`."""
    config = tiny(folder, **sections)
    open_or_prepare(config, folder)
    run = RunFolder.of(config)
    run.open(config, {"data": {"store": str(config.data.store)}})
    with start_mesh(config.layout) as mesh:
        pieces = {f"model.{name}": piece_of(p) for name, p in build_model(config, mesh).named_parameters()}
        for step in steps:
            save(run.checkpoints, step, pieces, {"step": step, "tokens": step * 32}, mesh)
    return run
