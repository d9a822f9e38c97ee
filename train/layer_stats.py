"""Every tracking.detail_every steps: gradient norm and update-to-weight ratio by layer, largest attention logit."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minka.model.head import IGNORED
from minka.parallel.engine import Engine, MicroBatch
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.plan.config_sections import ModelSection


class Updates(Protocol):
    """Who knows what the last step took from each weight."""

    def update_squares(self, learning_rate: float) -> dict[str, Tensor]: ...


class Rows(NamedTuple):
    """A MicroBatch."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor


class LayerStats:
    """One detailed step. `before_apply` while the gradients are there, then `after_apply`. Collective."""

    def __init__(self, engine: Engine, optimizer: Updates, mesh: Mesh, model: ModelSection) -> None:
        self.engine, self.optimizer, self.mesh, self.model = engine, optimizer, mesh, model
        self._gradients: dict[str, float] = {}
        self._logits: list[float] = []

    def before_apply(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Read the gradients, and the attention logits of the weights that made them, over all rows of the step."""
        pieces = self.engine.gradient_pieces()
        self._gradients = self._over_ranks(_squares(pieces), pieces)
        # The mesh sums; the largest of a few ranks is the largest of a row with a place for each.
        row = torch.zeros(self.mesh.ranks, self.model.layers, device=self.mesh.device)
        row[self.mesh.rank] = float("-inf")
        first = Rows(*(getattr(micro_batches[0], name)[:1] for name in Rows._fields))
        nothing = _empty(first)[0]  # more ranks than rows
        for rows in micro_batches:
            for layer, largest in self.engine.attention_logits(_without_fillers(rows, first)).items():
                seen = torch.where(nothing, float("-inf"), largest)
                row[self.mesh.rank, layer] = torch.maximum(row[self.mesh.rank, layer], seen)
        self._logits = self.mesh.sum_(row).amax(dim=0).tolist()

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
        """Sums by layer over all ranks: which have parts of a parameter, copies of one, or other layers."""
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


def _empty(rows: MicroBatch) -> Tensor:
    """Which rows have no targets, [B]."""
    return (rows.targets == IGNORED).all(dim=1)


def _without_fillers(rows: MicroBatch, instead: Rows) -> Rows:
    """Fillers are other ones under every layout: another row in their places, and the largest logit is the run's."""
    fill = _empty(rows)[:, None]
    return Rows(*(torch.where(fill, getattr(instead, name), getattr(rows, name)) for name in Rows._fields))


def _squares(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    return {name: piece.local.double().square().sum() for name, piece in pieces.items()}
