"""Checkpoints that nobody trained: a few tensors, or a run as `minka eval` and `minka export` find it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.write import SaveRequest
from minka.data.prepare import open_or_prepare
from minka.parallel.apply import build_parts, named_parameters
from minka.parallel.mesh import Mesh, start_mesh
from minka.parallel.pieces import Piece, parameter_piece, piece_of
from minka.plan.layout import Layout
from minka.plan.run_folder import RunFolder
from tiny import tiny

ALONE = Mesh(Layout(shard=1), torch.device("cpu"), 0, None)


class Saved(NamedTuple):
    path: Path
    bytes: int


def tensors(seed: int = 0) -> dict[str, Piece]:
    """A matrix, a vector and a scalar, each in one piece."""
    generator = torch.Generator().manual_seed(seed)
    made = {"model.w": torch.randn(7, 3, generator=generator), "model.b": torch.randn(5, generator=generator)}
    return {name: piece_of(tensor) for name, tensor in (made | {"count": torch.tensor(float(seed))}).items()}


def save(
    folder: Path,
    step: int,
    pieces: Mapping[str, Piece],
    state: Mapping[str, object],
    mesh: Mesh,
    *,
    keep: int = 100,
    permanent: bool = False,
    alive: Callable[[], None] = lambda: None,
    fs: FileSystem = LOCAL,
) -> Saved:
    """Write a checkpoint and wait for it. Raises OSError when it could not be written."""
    saver = AsyncSaver(folder, mesh, keep, asynchronous=False, fs=fs)
    saver.save(SaveRequest(step, state, permanent), pieces, alive)
    outcome = saver.poll()
    assert outcome is not None
    if outcome.error:
        raise OSError(outcome.error)
    return Saved(outcome.path, outcome.bytes)


def silent(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} was passed over: {reason}")


def saved_run(folder: Path, *steps: int, **sections: Any) -> RunFolder:
    """The run of `tiny` under `folder` with its initial weights saved at each of `steps`."""
    config = tiny(folder, **sections)
    store = open_or_prepare(config, folder)
    run = RunFolder.of(config)
    run.create(config, {"data": {"store": str(config.data.store), "manifest_sha256": store.hash}})
    with start_mesh(config.layout) as mesh:
        parameters = named_parameters(build_parts(config, mesh))
        pieces = {f"model.{name}": parameter_piece(p) for name, p in parameters.items()}
        for step in steps:
            save(run.checkpoints, step, pieces, {"step": step, "tokens": step * 32}, mesh)
    return run
