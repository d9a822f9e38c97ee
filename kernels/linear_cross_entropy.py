"""Linear cross-entropy: from hidden states, a vocabulary's matrix and targets to the loss, without all logits at once.

N tokens of the flattened batch · D width · V vocabulary, or the rows of it that are here
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide
from minka.kernels.cross_entropy import ALL_ROWS, How, Losses, VocabShard, cross_entropy_
from minka.kernels.optional_triton import interprets


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_weight: float,
    chunk: int,
    rows: VocabShard = ALL_ROWS,
    how: How = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """(objective, loss, z_loss): sums over the targets that are not IGNORED, fp32 scalars, objective = loss + z_loss.

    loss is in nats; z_loss is z_weight * logsumexp^2 (Chowdhery et al. 2022, section 5). Only objective has a gradient.
    The logits of `chunk` tokens exist at once.
    With a shard of the vocabulary the numbers are those of the whole vocabulary; the gradient of `hidden` is this
    shard's term of a sum.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_weight, chunk, rows, how)


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    rows: VocabShard = ALL_ROWS,
    how: How = "torch",
    *,
    hits: bool = False,
) -> Losses:
    """Losses of each target, [N] in fp32, without gradients; with hits=True also whether it has the largest logit."""
    needed = (False, False)
    return _chunked(hidden_ND, weight_VD, targets_N, 0.0, chunk, rows, how, needed, hits)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's probabilities are in cache; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_weight: float,
        chunk: int,
        rows: VocabShard,
        how: How,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[:2]
        losses, *gradients = _chunked(hidden_ND, weight_VD, targets_N, z_weight, chunk, rows, how, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        loss, z_loss = losses.loss.sum(), losses.z_loss.sum()
        ctx.mark_non_differentiable(loss, z_loss)
        return loss + z_loss, loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


def _chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_weight: float,
    chunk: int,
    rows: VocabShard,
    how: How,
    needed: Any,
    hits: bool = False,
) -> tuple[Losses, Tensor | None, Tensor | None]:
    """Losses of all tokens, and the gradients of their sum; those of the weight in fp32.

    needed: whether the gradient of `hidden`, and that of the weight, are. The loop is Python's, so that what it makes
    is seen by whoever traces memory, and a rank's reductions stand between operators.
    """
    (tokens, _), vocab = hidden_ND.shape, weight_VD.shape[0]
    chunk = max(1, min(tokens, chunk))
    exact = wide(hidden_ND).dtype
    losses = torch.empty(tokens, dtype=exact, device=hidden_ND.device)
    z_losses = torch.empty_like(losses)
    all_hits = torch.empty(tokens, dtype=torch.bool, device=hidden_ND.device) if hits else None
    buffer = torch.empty(chunk, vocab, dtype=hidden_ND.dtype, device=hidden_ND.device)
    d_hidden = torch.empty_like(hidden_ND) if needed[0] else None
    d_weight = torch.zeros(weight_VD.shape, dtype=exact, device=weight_VD.device) if needed[1] else None
    for begin in range(0, tokens, chunk):
        part = slice(begin, begin + chunk)
        hidden = hidden_ND[part]
        logits = torch.mm(hidden, weight_VD.t(), out=buffer[: len(hidden)])
        found = cross_entropy_(logits, targets_N[part], z_weight, rows, gradient=any(needed), hits=hits, how=how)
        losses[part], z_losses[part] = found.loss, found.z_loss
        if all_hits is not None and found.hit is not None:
            all_hits[part] = found.hit
        if d_hidden is not None:
            torch.mm(logits, weight_VD, out=d_hidden[part])
        if d_weight is not None:
            _add_product(d_weight, logits, hidden, how)
    return Losses(losses, z_losses, all_hits), d_hidden, d_weight


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor, how: How) -> None:
    """total += d_logits' hidden; total is fp32 where these are half precision."""
    if total.dtype == hidden.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif how == "triton" and not interprets():  # a product of halves with a sum in fp32, which torch has on GPUs alone
        torch.addmm(total, d_logits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(d_logits.t() @ hidden)
