"""Linear cross-entropy: from hidden states, a vocabulary's matrix and targets to the loss, without all logits at once.

N tokens of the flattened batch · D width · V vocabulary, or the rows of it that are here
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide

IGNORED = -100  # a target that counts for nothing


class VocabShard(NamedTuple):
    """The rows of the vocabulary's matrix on this rank, from `first`, and reductions over all ranks' rows, in place."""

    first: int
    max_: Callable[[Tensor], object]
    sum_: Callable[[Tensor], object]


ALL_ROWS = VocabShard(0, lambda here: here, lambda here: here)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float, chunk: int, rows: VocabShard = ALL_ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    """(objective, loss, z_loss): sums over the targets that are not IGNORED, fp32 scalars, objective = loss + z_loss.

    loss is in nats; z_loss is z_weight * logsumexp^2 (Chowdhery et al. 2022, section 5). Only objective has a gradient.
    The logits of `chunk` tokens exist at once.
    With a shard of the vocabulary the numbers are those of the whole vocabulary; the gradient of `hidden` is this
    shard's term of a sum.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_weight, chunk, rows)


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, rows: VocabShard = ALL_ROWS
) -> Tensor:
    """Nats of each target, [N] fp32, 0 where ignored; no gradient."""
    return _chunked(hidden_ND, weight_VD, targets_N, 0.0, chunk, rows, (False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's probabilities are in cache; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float, chunk: int, rows: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[:2]
        losses, z_losses, *gradients = _chunked(hidden_ND, weight_VD, targets_N, z_weight, chunk, rows, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        loss, z_loss = losses.sum(), z_losses.sum()
        ctx.mark_non_differentiable(loss, z_loss)
        return loss + z_loss, loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None, None


def _chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float, chunk: int, rows: VocabShard, needed: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses [N] and weighted z-losses [N] in fp32, and the gradients of their sum; those of the weight in fp32.

    needed: whether the gradient of `hidden`, and that of the weight, are.
    """
    (tokens, _), vocab = hidden_ND.shape, weight_VD.shape[0]
    chunk = max(1, min(tokens, chunk))
    exact = wide(hidden_ND).dtype
    losses = torch.empty(tokens, dtype=exact, device=hidden_ND.device)
    z_losses = torch.empty_like(losses)
    buffer = torch.empty(chunk, vocab, dtype=hidden_ND.dtype, device=hidden_ND.device)
    d_hidden = torch.empty_like(hidden_ND) if needed[0] else None
    d_weight = torch.zeros(weight_VD.shape, dtype=exact, device=weight_VD.device) if needed[1] else None
    for begin in range(0, tokens, chunk):
        part = slice(begin, begin + chunk)
        hidden, counts = hidden_ND[part], targets_N[part, None] != IGNORED
        target = targets_N[part, None].where(counts, 0) - rows.first
        here = (target >= 0) & (target < vocab)  # the target's row is one of these
        target = target.where(here, 0)
        logits = torch.mm(hidden, weight_VD.t(), out=buffer[: len(hidden)])
        shifted = wide(logits)
        peak = shifted.amax(dim=1, keepdim=True)
        rows.max_(peak)
        at_target = shifted.gather(1, target) * here
        exponents = shifted.sub_(peak).exp_()
        sums = torch.cat((exponents.sum(dim=1, keepdim=True), at_target), dim=1)
        rows.sum_(sums)
        total, at_target = sums.split(1, dim=1)
        log_total = total.log().add_(peak)
        losses[part] = ((log_total - at_target) * counts).squeeze(1)
        z_losses[part] = (z_weight * log_total.square() * counts).squeeze(1)
        if not any(needed):
            continue
        scale = counts * (1 + 2 * z_weight * log_total) / total  # probability, z-loss and mask in one factor
        # The target's entry is formed before rounding: probability - 1 cancels.
        exponents.scatter_add_(1, target, here * total / -(1 + 2 * z_weight * log_total))
        d_logits = torch.mul(exponents, scale, out=logits)
        if d_hidden is not None:
            torch.mm(d_logits, weight_VD, out=d_hidden[part])
        if d_weight is not None and d_weight.dtype == d_logits.dtype:
            d_weight.addmm_(d_logits.t(), hidden)
        elif d_weight is not None:
            d_weight.add_(d_logits.t() @ hidden)  # the sum over chunks is in fp32
    return losses, z_losses, d_hidden, d_weight
