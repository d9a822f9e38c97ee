"""From a model on the meta device to this rank's part of it. The order of the cuts is the contract of the folder."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minka.kernels.choose import Kernels
from minka.model.initial_weights import fill_
from minka.model.transformer import Transformer
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.compile_block import compile_block
from minka.parallel.fsdp import shard_model
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, parameter_piece
from minka.parallel.recompute import SelectivePolicy, recompute
from minka.parallel.tensor import cut_tensor
from minka.plan.config import RunConfig
from minka.plan.execution_choices import compiles_full_graph
from minka.plan.pipeline_stages import stages_of


def build_parts(config: RunConfig, mesh: Mesh) -> list[Transformer]:
    """This rank's part of the model, with its initial weights: its pipeline stages, or one part that is all of it."""
    parts = cut(config, mesh)
    # Offloaded weights are stored on the CPU: FSDP copies them to the GPU to gather them, and reduced gradients back.
    storage = torch.device("cpu") if mesh.layout.offload == "all" else mesh.device
    for part in parts:
        part.to_empty(device=storage)
    initialise(weight_pieces(parts).items(), config, mesh.device)
    return parts


def cut(config: RunConfig, mesh: Mesh, kernels: Kernels | None = None) -> list[Transformer]:
    """The same parts on the meta device; kernels: those of this rank's device, unless given.

    Take the stage, cut tensors, recompute, compile, shard: each of these sees what the ones before left.
    """
    kernels = kernels or kernels_of(config, mesh)
    parts, policy = [], SelectivePolicy(scattered=config.layout.tensor > 1)
    for stage in mesh.layout.stages_of_rank(mesh.coordinate["pipeline"]):
        with torch.device("meta"):
            model = Transformer(config.model, kernels)
        if mesh.layout.precision == "fp64":
            model.double()
        elif config.optimizer.weights == "bf16":
            model.bfloat16()
        take_stage(model, stage, stages_of(mesh.layout, config.model))
        cut_tensor(model, mesh)
        blocks: list[Any] = list(model.blocks.values())
        for block in blocks:
            if config.layout.recompute != "none":
                recompute(block, config.layout.recompute, policy)
            if config.kernels.compile:
                compile_block(block, full_graph=compiles_full_graph(mesh.layout))
        shard_model(model, blocks, mesh)
        parts.append(model)
    return parts


def named_parameters(parts: Sequence[Transformer]) -> dict[str, nn.Parameter]:
    """The parameters of all of a rank's parts; names do not depend on the part."""
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}


def weight_pieces(parts: Sequence[Transformer]) -> dict[str, Piece]:
    """This rank's pieces of the same parameters."""
    return {name: parameter_piece(parameter) for name, parameter in named_parameters(parts).items()}


@torch.no_grad()
def initialise(pieces: Iterable[tuple[str, Piece]], config: RunConfig, device: torch.device) -> None:
    """Fill this rank's pieces of named parameters; weights follow from (seed, name, global index) alone.

    The numbers are made on `device`: a host would take minutes for the weights that it keeps for a GPU.
    """
    for name, (local, offset, shape, *_) in pieces:
        on_device = local if local.device == device else torch.empty_like(local, device=device)
        fill_(on_device, name, config.run.seed, config.model, offset=offset, global_shape=shape)
        if on_device is not local:
            local.copy_(on_device)


def take_stage(model: Transformer, stage: int, stages: Sequence[range]) -> None:
    """Reduce `model` (on the meta device) to the layers of `stages[stage]`; the end stages keep embedding and head."""
    for layer in list(model.blocks):
        if int(layer) not in stages[stage]:
            del model.blocks[layer]
    if stage > 0:
        model.embedding = nn.Identity()  # type: ignore[assignment]  # what comes in are hidden states
    if stage < len(stages) - 1:
        model.norm = _Sum()  # type: ignore[assignment]
        model.head = NoHead()  # type: ignore[assignment]


class _Sum(nn.Module):
    """In place of a norm that is on a different stage: only the sum is sent there."""

    def forward(self, x_BTD: Tensor, added_BTD: Tensor | None = None) -> tuple[Tensor, None]:
        return x_BTD if added_BTD is None else x_BTD + added_BTD, None


class NoHead(nn.Module):
    """In place of a head that is on a different stage: returns hidden states unchanged."""

    def logits(self, hidden_BTD: Tensor, at: int | None = None) -> Tensor:
        return hidden_BTD

    def forward(self, hidden_BTD: Tensor, targets_BT: Tensor, reduce: bool = True) -> Tensor:
        return hidden_BTD
