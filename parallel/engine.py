"""The engine: the one interface between the training loop and everything parallel.

It holds weights, gradients and optimizer state; an Executor (fsdp_engine.py, pipeline_engine.py) runs the passes; an
InputCutter makes their inputs.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minka.kernels.many_tensors import Chunks
from minka.kernels.squared_norm import squares_of_all
from minka.model.transformer import Transformer
from minka.parallel.apply import named_parameters, weight_pieces
from minka.parallel.inputs import InputCutter, MicroBatch, ModelInputs
from minka.parallel.pieces import Piece, parameter_piece, piece_of, squared_norm


class Sums(NamedTuple):
    """Of a whole global batch, over all ranks; scalars on the device. The loss holds no z-loss."""

    loss: Tensor
    z_loss: Tensor


class Optimizer(Protocol):
    """Updates local tensors."""

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, divisor: Tensor, accept: Tensor) -> None:
        """Update every parameter with gradient / divisor; change no bit where `accept` is false."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"moment1": {parameter name: local tensor}, ...}."""

    def count(self) -> Tensor:
        """Accepted steps so far; a scalar that `step` increments and a restore overwrites."""


class Executor(Protocol):
    """Runs the passes of this rank's parts of a model."""

    parts: Sequence[Transformer]  # sharded or not, in the order they run

    def forward(self, inputs: ModelInputs, **options: object) -> Tensor | None:
        """One forward pass; None where other ranks have the end of the model. Called under no_grad."""

    def forward_backward(self, micro_batches: Sequence[ModelInputs], divisor: int) -> Sequence[Tensor]:
        """Add up gradients of objective / divisor; [loss, z_loss] of each micro-batch whose end is on this rank."""


class Scorer:
    """A model on one rank or many, run by an executor, for evaluation. All methods but `prepare` are collective."""

    def __init__(self, executor: Executor, cutter: InputCutter) -> None:
        self.executor, self.cutter, self.mesh = executor, cutter, cutter.mesh
        self.kernels = executor.parts[0].kernels

    def prepare(self, micro_batch: MicroBatch) -> ModelInputs:
        """This rank's inputs of a micro-batch: host work, for any thread."""
        return self.cutter.prepare(micro_batch)

    def token_losses(self, inputs: ModelInputs) -> Tensor:
        """Nats of each target, [B, T] of whole rows, no gradient.

        Of the ranks that share these sequences one has the loss of a target, and the rest 0: sums over ranks are right.
        """
        losses = self._forward(inputs, reduce=False)
        if losses is None or not self.mesh.leads_tensor:
            losses = torch.zeros(inputs.tokens.shape, dtype=self.mesh.sum_dtype, device=self.mesh.device)
        return self.cutter.whole_rows(losses, inputs.tokens.shape[1] * self.mesh.layout.context)

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        """Logits [V] in fp32 of what follows the token at `place` of one document [1, T] on the host; on every rank."""
        inputs, at = self.cutter.prepare_row(tokens, place)
        logits = self._forward(inputs, at=at or 0)
        found = torch.zeros(self.executor.parts[0].cfg.vocab, dtype=self.mesh.sum_dtype, device=self.mesh.device)
        # Of all ranks that have these logits, one adds them to the sum.
        if logits is not None and at is not None and self.mesh.leads_tensor and self.mesh.data_rank == 0:
            found += logits[0, 0]
        return self.mesh.sum_(found)

    def attention_logits(self, inputs: ModelInputs) -> dict[int, Tensor]:
        """The largest attention logit of each of this rank's layers, over its rows and heads; scalars in fp32."""
        probe: deque[Tensor] = deque()  # a list would be copied by DeepSpeed's hooks on its way down
        self._forward(inputs, reduce=False, probe=probe)
        layers = [int(layer) for part in self.executor.parts for layer in part.blocks]
        return dict(zip(layers, probe, strict=True))

    def weights(self) -> dict[str, Piece]:
        """This rank's pieces of the weights, under the names of a checkpoint: model.*."""
        return {f"model.{name}": piece for name, piece in weight_pieces(self.executor.parts).items()}

    def _forward(self, inputs: ModelInputs, **options: object) -> Tensor | None:
        with torch.no_grad():
            found = self.executor.forward(inputs, **options)
        free_gathered_weights(self.executor.parts)
        return found


class Engine(Scorer):
    """Forward, backward and update of a model on one rank or many."""

    def __init__(self, executor: Executor, cutter: InputCutter, optimizer: Optimizer) -> None:
        super().__init__(executor, cutter)
        self.optimizer = optimizer
        self._parameters = named_parameters(executor.parts)
        self._pieces = weight_pieces(executor.parts)
        self._norm = torch.zeros((), device=self.mesh.device)
        if self.kernels.grad_norm == "triton":
            self._chunks = Chunks.of([piece.local.numel() for piece in self._pieces.values()], self.mesh.device)
            shares = [1 / piece.copies for piece in self._pieces.values()]
            self._shares = torch.tensor(shares, dtype=torch.float64).to(self.mesh.device)

    def forward_backward(self, micro_batches: Sequence[ModelInputs], target_count: int) -> Sums:
        """Gradients of (sum of losses) / target_count; target_count is that of the whole global batch."""
        found = self.executor.forward_backward(micro_batches, max(target_count, 1))
        for parameter in self._parameters.values():
            gradient = parameter.grad  # a share of a tensor group's sum, where FSDP has not added them up
            if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                parameter.grad = gradient.redistribute(placements=parameter.placements)
        total = torch.zeros(2, dtype=self.mesh.sum_dtype, device=self.mesh.device)
        for sums in found if self.mesh.leads_tensor else ():  # the ranks of a tensor group count once
            total += sums
        self.mesh.sum_(total)
        return Sums(total[0], total[1])

    def grad_norm(self) -> Tensor:
        """Global norm of the gradients, before clipping; scalar, equal on all ranks."""
        self._norm = self.mesh.sum_(self._squares()).sqrt().to(self.mesh.sum_dtype)
        return self._norm

    def _squares(self) -> Tensor:
        """This rank's part of the squared norm."""
        if self.kernels.grad_norm == "triton":
            gradients = self.gradients()
            return squares_of_all([gradients[name].contiguous() for name in self._pieces], self._shares, self._chunks)
        return squared_norm(list(self.gradient_pieces().values())).to(self.mesh.device)

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """Clip by the norm of the last grad_norm(), update, drop the gradients.

        `accept` is a scalar bool on the device: false changes no bit.
        """
        divisor = ((self._norm + 1e-6) / max_norm).clamp(min=1.0)  # as torch.nn.utils.clip_grad_norm_
        self.optimizer.step(self.gradients(), learning_rate, divisor, accept)
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Piece]:
        """All state, by name: model.*, moment1.*, moment2.*, and the optimizer's own count."""
        found = self.weights()
        for kind, tensors in self.optimizer.state().items():
            found |= {f"{kind}.{name}": self._pieces[name]._replace(local=local) for name, local in tensors.items()}
        found["optimizer.count"] = piece_of(self.optimizer.count())
        return found

    def after_restore(self) -> None:
        """To be called when tensors() have been overwritten, before the next step. Collective."""

    def weight_pieces(self) -> dict[str, Piece]:
        """This rank's weights by parameter name, in the same boxes as gradient_pieces()."""
        return self._pieces

    def gradient_pieces(self) -> dict[str, Piece]:
        """This rank's gradients by parameter name; valid until apply()."""
        return {name: self._pieces[name]._replace(local=local) for name, local in self.gradients().items()}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients, as plain tensors."""
        found = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: the backward pass did not reach it")
            found[name] = parameter_piece(parameter.grad).local
        return found


def free_gathered_weights(parts: Sequence[Transformer]) -> None:
    """After a forward pass alone: gathered weights would be taken for those of the next step, even after an update."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
