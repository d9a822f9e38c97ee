"""Every tracking.detail_every steps: gradient norm and update-to-weight ratio by layer, largest attention logit."""

import torch
from torch import Tensor

from minka.parallel.engine import MicroBatch, ShardedEngine
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.train.metrics import layer_norms
from minka.train.optim import AdamW


class Detail:
    """One detailed step. `before_apply` while the gradients are there, then `after_apply`. Collective."""

    def __init__(self, engine: ShardedEngine, optimizer: AdamW, mesh: Mesh) -> None:
        self.engine, self.optimizer, self.mesh = engine, optimizer, mesh
        self._gradients: dict[str, float] = {}
        self._logits: list[float] = []

    def before_apply(self, micro_batch: MicroBatch) -> None:
        """Read the gradients, and the attention logits of the weights that made them."""
        pieces = self.engine.gradient_pieces()
        self._gradients = self._over_ranks({n: p.local.double().square().sum() for n, p in pieces.items()}, pieces)
        largest = self.engine.attention_logits(micro_batch)
        # The mesh sums; the largest of a few ranks is the largest of a row with a place for each.
        row = torch.zeros(self.mesh.ranks, len(largest), device=self.mesh.device)
        row[self.mesh.rank] = largest
        self._logits = self.mesh.sum_(row).amax(dim=0).tolist()

    def gradient_norms(self) -> dict[str, float]:
        """By layer, of the gradients that before_apply saw."""
        return layer_norms(self._gradients)

    def after_apply(self, learning_rate: float) -> dict[str, object]:
        """The ledger's `detail` fields, by layer."""
        tensors = self.engine.tensors()
        pieces = {name: tensors[f"model.{name}"] for name in self._gradients}
        weights = self._over_ranks({n: p.local.double().square().sum() for n, p in pieces.items()}, pieces)
        updates = self._over_ranks(self.optimizer.update_squares(learning_rate), pieces)
        of_weights, of_updates = layer_norms(weights), layer_norms(updates)
        return {
            "grad_norm": self.gradient_norms(),
            "update_ratio": {name: of_updates[name] / max(of_weights[name], 1e-30) for name in of_updates},
            "max_attention_logit": {f"blocks.{i}": value for i, value in enumerate(self._logits)},
        }

    def _over_ranks(self, squares: dict[str, Tensor], pieces: dict[str, Piece]) -> dict[str, float]:
        stacked = torch.stack([squares[name] / pieces[name].copies for name in pieces])
        return dict(zip(pieces, self.mesh.sum_(stacked).tolist(), strict=True))
