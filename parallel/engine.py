"""The engine: the one interface between the training loop and everything parallel, and what its torch forms share."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minka.model.transformer import Transformer
from minka.parallel.apply import named_parameters
from minka.parallel.inputs import Feeder
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, like, parameter_piece, piece_of, squared_norm


class MicroBatch(Protocol):
    """What a model is fed: dense int64 tensors of shape [B, T] on this rank's device."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


class Sums(NamedTuple):
    """Of a whole global batch, over all ranks; scalars on the device. The loss holds no z-loss."""

    loss: Tensor
    z_loss: Tensor


class Optimizer(Protocol):
    """What an engine steps: it knows local tensors only."""

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, divisor: Tensor, accept: Tensor) -> None:
        """Update every parameter with gradient / divisor; change no bit where `accept` is false."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"moment1": {parameter name: local tensor}, ...}."""

    def count(self) -> Tensor:
        """Accepted steps so far; a scalar that `step` moves on and a restore overwrites."""


class Scorer(Protocol):
    """A model, spread or not, that evaluation asks for losses and logits. All of it is collective."""

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """Nats of each target, [B, T], no gradient.

        Each stands on one of the ranks that share these sequences, with 0 on the others: sums over all ranks are right.
        """

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        """What follows the token at `place` of a row [1, T] that is one document: logits [V] fp32, on every rank."""


class Engine(Scorer, Protocol):
    """Forward, backward and update of a model that may be spread over many ranks."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """Gradients of (sum of losses) / target_count; target_count is that of the whole global batch."""

    def grad_norm(self) -> Tensor:
        """Global norm of the gradients, before clipping; scalar, equal on all ranks."""

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """Clip, update, forget the gradients. `accept` is a scalar bool on the device: false changes no bit."""

    def tensors(self) -> dict[str, Piece]:
        """All state, by name: model.*, moment1.*, moment2.*, and the optimizer's own count."""

    def after_restore(self) -> None:
        """Whoever has written into tensors() says so before the next step. Collective."""

    def gradient_pieces(self) -> dict[str, Piece]:
        """This rank's gradients by parameter name; valid until apply()."""

    def weight_pieces(self) -> dict[str, Piece]:
        """This rank's weights by parameter name, in the same boxes as gradient_pieces()."""

    def attention_logits(self, micro_batch: MicroBatch) -> dict[int, Tensor]:
        """The largest attention logit of each layer that is here, on this rank's rows and heads; fp32."""


class ModelParts:
    """A rank's parts of a model: torch modules, sharded or not, and what makes their inputs."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh, feeder: Feeder) -> None:
        self.parts, self.mesh, self.feeder = parts, mesh, feeder
        self._exact = torch.float64 if feeder.dtype == torch.float64 else torch.float32  # of sums and losses

    def weights(self) -> dict[str, Piece]:
        """This rank's pieces of the weights: model.*."""
        return {f"model.{name}": parameter_piece(p) for name, p in named_parameters(self.parts).items()}

    def _tells(self, at: int | None) -> bool:
        """Whether this rank is the one that tells all others the logits of a place that is its `at`."""
        return at is not None and self.mesh.leads_tensor and self.mesh.data_rank == 0

    def _forget_gathered(self) -> None:
        """After a forward pass without a backward one.

        What stays gathered for a backward pass that never comes would be taken for the weights of the next step, even
        after an update.
        """
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


class TorchEngine(ModelParts):
    """Gradients, their norm, the update and the state of parts of a model."""

    def __init__(self, parts: Sequence[Transformer], mesh: Mesh, feeder: Feeder, optimizer: Optimizer) -> None:
        super().__init__(parts, mesh, feeder)
        self.optimizer = optimizer
        self._parameters = named_parameters(parts)
        self._pieces = {name: parameter_piece(parameter) for name, parameter in self._parameters.items()}
        self._norm = torch.zeros((), device=mesh.device)

    def grad_norm(self) -> Tensor:
        """See Engine."""
        squares = squared_norm(list(self.gradient_pieces().values())).to(self.mesh.device)
        self._norm = self.mesh.sum_(squares).sqrt().to(self._exact)
        return self._norm

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """See Engine; uses the norm of the last grad_norm(). Clipping as torch.nn.utils.clip_grad_norm_."""
        divisor = ((self._norm + 1e-6) / max_norm).clamp(min=1.0)
        self.optimizer.step(self.gradients(), learning_rate, divisor, accept)
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradient_pieces(self) -> dict[str, Piece]:
        """See Engine."""
        return {name: like(self._pieces[name], gradient) for name, gradient in self.gradients().items()}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients, as plain tensors."""
        found = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: the backward pass did not reach it")
            found[name] = parameter_piece(parameter.grad).local
        return found

    def tensors(self) -> dict[str, Piece]:
        """See Engine."""
        found = {f"model.{name}": piece for name, piece in self._pieces.items()}
        for kind, tensors in self.optimizer.state().items():
            found |= {f"{kind}.{name}": like(self._pieces[name], tensor) for name, tensor in tensors.items()}
        found["optimizer.count"] = piece_of(self.optimizer.count())
        return found

    def after_restore(self) -> None:
        """See Engine: these tensors are what the model computes with."""

    def weight_pieces(self) -> dict[str, Piece]:
        """See Engine."""
        return self._pieces

    def _sum_up(self, sums: Sequence[Tensor]) -> Sums:
        """Of each micro-batch that ended here [2], loss and z-loss; added up over the ranks, each of them once."""
        total = torch.zeros(2, dtype=self._exact, device=self.mesh.device)
        for one in sums if self.mesh.leads_tensor else ():
            total += one
        self.mesh.sum_(total)
        return Sums(total[0], total[1])

    def _complete_gradients(self) -> None:
        """Sum what the ranks of a tensor group have shares of; FSDP has done so where there is one."""
        for parameter in self._parameters.values():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = gradient.redistribute(placements=parameter.placements)
