"""The engine: the one interface between the training loop and everything parallel, and its FSDP2 form."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minka.model.transformer import Transformer
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, like, piece_of, squared_norm


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
    """A model, spread or not, that evaluation asks for losses and logits."""

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """Nats of each target, [B, T] fp32, no gradient. Collective: every rank calls it equally often."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V] fp32 for plain rows of one document, no gradient. Collective."""


class Engine(Scorer, Protocol):
    """Forward, backward and update of a model that may be spread over many ranks."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """Gradients of (sum of losses) / target_count; target_count is that of the whole global batch."""

    def grad_norm(self) -> Tensor:
        """Global norm of the gradients, before clipping; fp32 scalar, equal on all ranks."""

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """Clip, update, forget the gradients. `accept` is a scalar bool on the device: false changes no bit."""

    def tensors(self) -> dict[str, Piece]:
        """All state, by name: model.*, moment1.*, moment2.*, and the optimizer's own count."""


class ShardedScorer:
    """A model under FSDP2 or HSDP, or one unsharded rank, for evaluation. See Scorer."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh

    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """See Scorer."""
        b = micro_batch
        return self._forward(b.tokens, b.documents, b.positions, b.targets, reduce=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """See Scorer."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self._forward(tokens, None, positions)

    def attention_logits(self, micro_batch: MicroBatch) -> Tensor:
        """The largest attention logit of each layer on this rank's rows, [L] fp32. Collective."""
        probe: list[Tensor] = []
        b = micro_batch
        with torch.compiler.set_stance("force_eager"):
            self._forward(b.tokens, b.documents, b.positions, b.targets, reduce=False, probe=probe)
        return torch.stack(probe)

    def _forward(self, *tensors: Tensor | None, **options: object) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.model(*tensors, **options)
        # What stays gathered for a backward pass that never comes would be taken for the weights of the next step,
        # even after an update.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return result


class ShardedEngine(ShardedScorer):
    """FSDP2 or HSDP over all micro-batches of a step; the same code trains one unsharded rank. See Engine."""

    def __init__(self, model: Transformer, mesh: Mesh, optimizer: Optimizer) -> None:
        super().__init__(model, mesh)
        self.optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self._pieces = {name: piece_of(parameter) for name, parameter in self._parameters.items()}
        self._norm = torch.zeros((), device=mesh.device)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> Sums:
        """See Engine. Gradients are reduced once, in the last micro-batch's backward."""
        total = torch.zeros(2, dtype=torch.float32, device=self.mesh.device)
        for index, batch in enumerate(micro_batches):
            self._sync_gradients(index == len(micro_batches) - 1)
            sums = self.model(batch.tokens, batch.documents, batch.positions, batch.targets)
            (sums.objective / max(target_count, 1)).backward()
            total += torch.stack([sums.loss, sums.z_loss])
        self.mesh.sum_(total)
        return Sums(total[0], total[1])

    def grad_norm(self) -> Tensor:
        """See Engine."""
        self._norm = (
            self.mesh.sum_(squared_norm(list(self.gradient_pieces().values())).to(self.mesh.device)).sqrt().float()
        )
        return self._norm

    def apply(self, learning_rate: float, max_norm: float, accept: Tensor) -> None:
        """See Engine; uses the norm of the last grad_norm(). Clipping as torch.nn.utils.clip_grad_norm_."""
        divisor = ((self._norm + 1e-6) / max_norm).clamp(min=1.0)
        self.optimizer.step(self.gradients(), learning_rate, divisor, accept)
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradient_pieces(self) -> dict[str, Piece]:
        """This rank's gradients by parameter name; valid until apply()."""
        return {name: like(self._pieces[name], gradient) for name, gradient in self.gradients().items()}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients, as plain tensors."""
        found = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: the backward pass did not reach it")
            found[name] = piece_of(parameter.grad).local
        return found

    def tensors(self) -> dict[str, Piece]:
        """See Engine."""
        found = {f"model.{name}": piece for name, piece in self._pieces.items()}
        for kind, tensors in self.optimizer.state().items():
            found |= {f"{kind}.{name}": like(self._pieces[name], tensor) for name, tensor in tensors.items()}
        found["optimizer.count"] = piece_of(self.optimizer.count())
        return found

    def _sync_gradients(self, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
