"""Faults that parallel training is known to have had, to be planted in a rank: the comparison must see each of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate

from minka.parallel import apply, engine, inputs, tensor
from minka.parallel import fsdp as shard
from minka.parallel import pipeline_engine as pipeline
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, squared_norm
from minka.plan import execution_choices


def put(owner: Any, name: str, new: Any) -> None:
    """Something else in the place of a module's or a class's attribute, for as long as the process lives."""
    assert hasattr(owner, name), f"{owner.__name__} has no {name}: this fault would plant nothing"
    setattr(owner, name, new)


def divisor() -> None:
    """Divide by this rank's targets times the ranks: right only where every rank has equally many."""
    right = engine.Engine.forward_backward

    def wrong(self: engine.Engine, micro_batches: Any, target_count: int) -> Any:
        mine = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        return right(self, micro_batches, mine * self.mesh.ranks)

    put(engine.Engine, "forward_backward", wrong)


def norm_reduction() -> None:
    """Give each rank the gradient norm of its own pieces."""
    right = engine.Engine.grad_norm

    def wrong(self: engine.Engine) -> Tensor:
        summed = Mesh.sum_
        Mesh.sum_ = lambda mesh, tensor: tensor  # type: ignore[method-assign,assignment]
        try:
            return right(self)
        finally:
            Mesh.sum_ = summed  # type: ignore[method-assign]

    put(engine.Engine, "grad_norm", wrong)


def document_boundaries() -> None:
    """Take each row for one document."""
    right: Any = vars(inputs)["document_structure"]
    put(inputs, "document_structure", lambda documents, **how: right(None, **how))


def norm_weight_reduction() -> None:
    """Take each rank's gradient of a norm's weight for the whole of it."""
    right = tensor._local
    put(tensor, "_local", lambda w, gradient: right(w, Replicate() if gradient.is_partial() else gradient))


def replica_in_norm() -> None:
    """Count every copy of a gradient in its norm."""

    def wrong(pieces: list[Piece]) -> Tensor:
        return squared_norm([piece._replace(copies=1) for piece in pieces])

    put(engine, "squared_norm", wrong)


def tied_gradient() -> None:
    """Lose the head's share of the gradient of tied weights."""
    right = tensor.VocabularyHead.matrix
    put(tensor.VocabularyHead, "matrix", lambda self: right(self).detach())


def document_leak() -> None:
    """Let tokens see earlier documents of their row."""
    right: Any = vars(inputs)["shard_structure"]
    put(inputs, "shard_structure", lambda ids, group, **how: right(torch.zeros_like(ids), group, **how))


def context_positions() -> None:
    """Give each rank the positions at the head of its sequences."""
    right = InputCutter.prepare

    def wrong(self: InputCutter, micro_batch: Any) -> ModelInputs:
        found = right(self, micro_batch)
        return replace(found, positions=micro_batch.positions[:, : found.positions.shape[1]])

    put(InputCutter, "prepare", wrong)


def stage_order() -> None:
    """Run the stages' layers in a different order."""
    right: Any = vars(apply)["stages_of"]
    put(apply, "stages_of", lambda layout, model: right(layout, model)[::-1])


def vocabulary_maximum() -> None:
    """Subtract each rank's own largest logit."""
    right = tensor.VocabularyHead.__init__

    def wrong(self: tensor.VocabularyHead, *given: Any) -> None:
        right(self, *given)
        self._over = (lambda x: x, self._over[1])

    put(tensor.VocabularyHead, "__init__", wrong)


def scale_grads() -> None:
    """Let the schedule divide by the number of micro-batches, as it does unasked."""
    for kinds in (pipeline.ONE_STAGE, pipeline.MANY_STAGES):
        for name, kind in kinds.items():
            kinds[name] = lambda *given, kind=kind, **more: kind(*given, **{**more, "scale_grads": True})


def resharding() -> None:
    """Free gathered weights after forward under every schedule."""
    put(shard, "frees_gathered_weights", lambda *given: True)
    put(execution_choices, "UNIT_BYTES", 1)


def dropped_all_reduce() -> None:
    """Keep each replica's gradients to itself."""
    right: Any = vars(shard)["fully_shard"]
    put(shard, "fully_shard", lambda unit, mesh, **more: right(unit, mesh=mesh["data"], **more))


def stale_gather() -> None:
    """Keep what an evaluation has gathered."""
    put(engine, "free_gathered_weights", lambda parts: None)


MUTANTS: dict[str, tuple[Callable[[], None], dict[str, Any], dict[str, Any]]] = {
    "divisor": (divisor, {"shard": 2}, {}),
    "norm-weight reduction": (norm_weight_reduction, {"tensor": 2}, {"qk_norm": True}),
    "replica counted twice in the norm": (replica_in_norm, {"replicate": 2}, {}),
    "tied gradient": (tied_gradient, {"tensor": 2}, {"tied": True}),
    "document leak": (document_leak, {"context": 2}, {}),
    "context positions": (context_positions, {"context": 2}, {}),
    "stage order": (stage_order, {"pipeline": 2}, {}),
    "vocabulary shard's maximum": (vocabulary_maximum, {"tensor": 2}, {}),
    "scale_grads": (scale_grads, {"pipeline": 2, "schedule": "interleaved"}, {}),
    "resharding under a split backward": (resharding, {"pipeline": 2, "shard": 2, "schedule": "dualpipev"}, {}),
    "dropped all-reduce": (dropped_all_reduce, {"replicate": 2}, {}),
    "stale gather": (stale_gather, {"shard": 2}, {}),
}
DRIFT = ("norm-weight reduction", "dropped all-reduce")  # ranks then have other weights, and nothing else to compare
