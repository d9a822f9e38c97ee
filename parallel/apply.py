"""From a model on the meta device to this rank's part of it. The order here is the contract of the whole folder."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minka.model.init import fill_
from minka.model.transformer import Transformer
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import piece_of
from minka.parallel.shard import shard_model
from minka.plan.config import RunConfig


def build_model(config: RunConfig, mesh: Mesh) -> Transformer:
    """This rank's part of the model, with its initial weights.

    Cut, then recompute, then compile, then shard, then materialise: each step sees what the ones before left.
    """
    with torch.device("meta"):
        model = Transformer(config.model, config.kernels)
    blocks = list(model.blocks.values())
    for block in blocks:
        if config.layout.recompute == "block":
            recompute(block)
        if config.kernels.compile:
            block.compile(fullgraph=config.layout.recompute == "none")
    shard_model(model, blocks, mesh, compute_dtype(config, mesh))
    model.to_empty(device=mesh.device)
    initialise(model, config)
    return model


def recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for backward and run its forward again there (Chen et al. 2016).

    The instance's forward is replaced rather than wrapped in a module, so parameter names stay as they are.
    """
    forward: Callable[..., Any] = block.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed


def initialise(model: Transformer, config: RunConfig) -> None:
    """Fill this rank's pieces; weights follow from (seed, name, global index) and from nothing else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            piece = piece_of(parameter)
            fill_(
                piece.local,
                name,
                config.run.seed,
                config.model,
                offset=piece.offset,
                global_shape=piece.global_shape,
            )


def compute_dtype(config: RunConfig, mesh: Mesh) -> torch.dtype:
    """bf16 on a GPU and fp32 elsewhere, unless the layout says otherwise."""
    precision = config.layout.precision
    if precision == "auto":
        precision = "bf16" if mesh.device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
