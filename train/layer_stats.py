"""Every tracking.detail_every steps: gradient norm and update-to-weight ratio by layer, largest attention logit."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from minka.data.batch import IGNORED, Batch
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.plan.config_sections import ModelSection


class Updates(Protocol):
    """An optimizer or engine that can say how far the last step moved each weight."""

    def update_squares(self, learning_rate: float) -> dict[str, Tensor]: ...


class LayerStats:
    """Statistics of one step: `before_apply` after the backward pass, `after_apply` after the update. Collective."""

    def __init__(self, engine: Engine, optimizer: Updates, mesh: Mesh, model: ModelSection) -> None:
        self.engine, self.optimizer, self.mesh, self.model = engine, optimizer, mesh, model
        self._gradients: dict[str, float] = {}
        self._logits: list[float] = []

    def before_apply(self, batch: Batch, micro_batch: int) -> None:
        """Read the gradients, and the attention logits of the weights that made them, over all the step's sequences."""
        pieces = self.engine.gradient_pieces()
        self._gradients = self._over_ranks(_squares(pieces), pieces)
        # Padding depends on the layout: a real sequence in its place gives the run's result under all of them.
        padding = (batch.targets == IGNORED).all(dim=1)
        real = batch.take(torch.arange(len(padding)).where(~padding, 0))
        # The mesh can only sum: each rank writes its own row, and the maximum is taken over rows.
        largest = torch.zeros(self.mesh.ranks, self.model.layers, device=self.mesh.device)
        largest[self.mesh.rank] = float("-inf")
        for part in real.micro_batches(micro_batch):
            for layer, logit in self.engine.attention_logits(self.engine.prepare(part)).items():
                if real.target_count:  # 0 where there are more ranks than sequences
                    largest[self.mesh.rank, layer] = torch.maximum(largest[self.mesh.rank, layer], logit)
        self._logits = self.mesh.sum_(largest).amax(dim=0).tolist()

    def after_apply(self, learning_rate: float) -> dict[str, object]:
        """The ledger's `detail` fields, by layer."""
        updated, pieces = self.optimizer.update_squares(learning_rate), self.engine.weight_pieces()
        weights, updates = self._over_ranks(_squares(pieces), pieces), self._over_ranks(updated, pieces)
        return {
            "grad_norm": {layer: square**0.5 for layer, square in self._gradients.items()},
            "update_ratio": {name: (updates[name] / max(weights[name], 1e-60)) ** 0.5 for name in updates},
            "max_attention_logit": {f"blocks.{i}": value for i, value in enumerate(self._logits)},
        }

    def _over_ranks(self, squares: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> dict[str, float]:
        """Sums by layer over all ranks, which may have parts of a parameter, copies of it, or different layers."""
        layers = layers_of(self.model)
        sums = torch.zeros(len(layers), dtype=torch.float64, device=self.mesh.device)
        for name, square in squares.items():
            sums[layers.index(layer_of(name))] += square / pieces[name].copies
        return dict(zip(layers, self.mesh.sum_(sums).tolist(), strict=True))


def layer_of(parameter: str) -> str:
    """The layer a parameter belongs to: "blocks.3", "embedding", "norm", "head"."""
    words = parameter.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def layers_of(model: ModelSection) -> list[str]:
    """All layers that have weights, in the order they run."""
    blocks = [f"blocks.{layer}" for layer in range(model.layers)]
    return ["embedding", *blocks, "norm", *([] if model.tied else ["head"])]


def _squares(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    return {name: piece.local.double().square().sum() for name, piece in pieces.items()}
