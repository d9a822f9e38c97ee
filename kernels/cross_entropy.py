"""Cross-entropy of logits, with the gradient written over them.

n tokens of a chunk · V vocabulary, or the columns of it that are here

"triton": a program has a row. It reads it once for the sums and once, from the cache, to write the gradient. Where the
vocabulary is cut over ranks, the two are kernels of their own, with the ranks' reductions between them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minka.kernels.accumulation_dtype import wide
from minka.kernels.optional_triton import jit, power_of_two, tl

How = Literal["torch", "triton"]
IGNORED = -100  # a target that counts for nothing
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANES = 512  # columns that a warp holds at once


class VocabShard(NamedTuple):
    """The rows of the vocabulary's matrix on this rank, from `first`, and reductions over all ranks' rows, in place."""

    first: int
    max_: Callable[[Tensor], object]
    sum_: Callable[[Tensor], object]


ALL_ROWS = VocabShard(0, lambda here: here, lambda here: here)


class Losses(NamedTuple):
    """Of each token, in fp32 (fp64 for fp64 logits); 0 where the target is IGNORED."""

    loss: Tensor  # [n], nats
    z_loss: Tensor  # [n], z_weight * logsumexp^2
    hit: Tensor | None  # bool [n]: the target's logit is the largest, and the first of equals; None if not asked for


def cross_entropy_(
    logits: Tensor, targets: Tensor, z_weight: float, rows: VocabShard, *, gradient: bool, hits: bool, how: How
) -> Losses:
    """Losses of logits [n, V] against targets [n] (int64, of the whole vocabulary).

    The logits are overwritten: with gradient=True by the gradient of the sum of loss and z_loss, else by anything.
    """
    if how == "torch":
        return _definition(logits, targets, z_weight, rows, gradient, hits)
    if rows is ALL_ROWS:
        loss, z_loss, hit = torch.ops.minka.cross_entropy_(logits, targets, z_weight, gradient, hits)
        return Losses(loss, z_loss, hit if hits else None)
    peak, total, at_target, best = torch.ops.minka.row_statistics(logits, targets - rows.first, hits)
    highest = peak.clone()
    rows.max_(highest)
    hit = _first_of_equals(peak, highest, best, targets, rows) if hits else None
    sums = torch.stack((total * (peak - highest).exp(), at_target))
    rows.sum_(sums)
    log_total, counts = sums[0].log() + highest, targets != IGNORED
    if gradient:
        torch.ops.minka.logit_gradient_(logits, targets - rows.first, counts, highest, sums[0], z_weight)
    loss = sums[0].log() + (highest - sums[1])  # large logits cancel first
    return Losses(loss * counts, z_weight * log_total.square() * counts, hit)


def _definition(
    logits: Tensor, targets: Tensor, z_weight: float, rows: VocabShard, gradient: bool, hits: bool
) -> Losses:
    counts = targets[:, None] != IGNORED
    target = targets[:, None].where(counts, 0) - rows.first
    here = (target >= 0) & (target < logits.shape[1])  # the target's row is one of these
    target = target.where(here, 0)
    shifted = wide(logits)
    peak = shifted.amax(dim=1, keepdim=True)
    own_peak, best = (peak[:, 0].clone(), shifted.argmax(dim=1)) if hits else (None, None)
    rows.max_(peak)
    at_target = shifted.gather(1, target) * here
    exponents = shifted.sub_(peak).exp_()
    sums = torch.cat((exponents.sum(dim=1, keepdim=True), at_target), dim=1)
    rows.sum_(sums)
    total, at_target = sums.split(1, dim=1)
    log_total = total.log().add_(peak)
    hit = None
    if own_peak is not None and best is not None:
        hit = _first_of_equals(own_peak, peak[:, 0], best, targets, rows)
    if gradient:
        scale = counts * (1 + 2 * z_weight * log_total) / total  # probability, z-loss and mask in one factor
        # The target's entry is formed before rounding: probability - 1 cancels.
        exponents.scatter_add_(1, target, here * total / -(1 + 2 * z_weight * log_total))
        torch.mul(exponents, scale, out=logits)
    losses = ((log_total - at_target) * counts).squeeze(1)
    return Losses(losses, (z_weight * log_total.square() * counts).squeeze(1), hit)


def _first_of_equals(peak: Tensor, highest: Tensor, best: Tensor, targets: Tensor, rows: VocabShard) -> Tensor:
    """Whether the target is the first column, over all ranks, whose logit is the highest."""
    column = (best + rows.first).where(peak == highest, torch.iinfo(torch.int64).max).neg()
    rows.max_(column)  # of the negative: the smallest
    return column.neg() == targets


# fmt: off
@jit
def _statistics(X, width, HITS: tl.constexpr, BLOCK: tl.constexpr):
    """(largest, sum of exponentials relative to it, first column that has it or 0) of a row."""
    peak = float("-inf")
    total = 0.0
    best = 0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(X + column, mask=column < width, other=float("-inf")).to(tl.float32)
        high = tl.max(x, axis=0)
        if HITS:
            at = tl.min(tl.where(x == high, column, width), axis=0)
            best = tl.where(high > peak, at, best)
        higher = tl.maximum(peak, high)
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), axis=0)
        peak = higher
    return peak, total, best


@jit
def _write_gradient(X, target, peak, scale, counts, width, BLOCK: tl.constexpr):
    """Over a row of logits: exp(x - peak) * scale, - 1 at the target; 0 where the row does not count."""
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(X + column, mask=column < width, other=0.0).to(tl.float32)
        gradient = tl.exp(x - peak) * scale - tl.where(column == target, 1.0, 0.0)
        gradient = tl.where(counts, gradient, 0.0)  # not a product: what does not count may be infinite
        tl.store(X + column, gradient.to(X.dtype.element_ty), mask=column < width)


@jit
def _cross_entropy_kernel(
    X, TARGET, LOSS, Z, HIT, width, step, z_weight,
    GRADIENT: tl.constexpr, HITS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    counts = target != -100
    X += row * step
    here = (target >= 0) & (target < width)
    at_target = tl.load(X + tl.where(here, target, 0)).to(tl.float32)  # before the row is overwritten
    peak, total, best = _statistics(X, width, HITS, BLOCK)
    log_total = tl.log(total) + peak
    z = tl.cast(z_weight, tl.float32)
    tl.store(LOSS + row, tl.where(counts, tl.log(total) + (peak - at_target), 0.0))  # large logits cancel first
    tl.store(Z + row, tl.where(counts, z * log_total * log_total, 0.0))
    if HITS:
        tl.store(HIT + row, best == target)
    if GRADIENT:
        _write_gradient(X, target, peak, (1.0 + 2.0 * z * log_total) / total, counts, width, BLOCK)


@jit
def _statistics_kernel(X, TARGET, PEAK, TOTAL, AT, BEST, width, step, HITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    X += row * step
    here = (target >= 0) & (target < width)
    at_target = tl.load(X + tl.where(here, target, 0)).to(tl.float32)
    peak, total, best = _statistics(X, width, HITS, BLOCK)
    tl.store(PEAK + row, peak)
    tl.store(TOTAL + row, total)
    tl.store(AT + row, tl.where(here, at_target, 0.0))
    tl.store(BEST + row, best)


@jit
def _gradient_kernel(X, TARGET, COUNTS, PEAK, TOTAL, width, step, z_weight, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak, total = tl.load(PEAK + row), tl.load(TOTAL + row)
    scale = (1.0 + 2.0 * tl.cast(z_weight, tl.float32) * (tl.log(total) + peak)) / total
    _write_gradient(X + row * step, tl.load(TARGET + row), peak, scale, tl.load(COUNTS + row), width, BLOCK)
# fmt: on


@torch.library.custom_op("minka::cross_entropy_", mutates_args=("logits",))
def _cross_entropy(
    logits: Tensor, targets: Tensor, z_weight: float, gradient: bool, hits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z-loss in fp32, and hits (empty if not asked for), each [n]."""
    (tokens, width), step, targets = logits.shape, _row_step(logits), targets.contiguous()
    loss, z_loss = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
    hit = torch.empty(tokens if hits else 0, dtype=torch.bool, device=logits.device)
    if tokens:
        block, warps = row_block(width)
        _cross_entropy_kernel[(tokens,)](
            logits, targets, loss, z_loss, hit, width, step, z_weight,
            GRADIENT=gradient, HITS=hits, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, z_loss, hit


@torch.library.custom_op("minka::row_statistics", mutates_args=())
def _row_statistics(logits: Tensor, targets: Tensor, hits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit, sum of exponentials relative to it, the target's logit (0: elsewhere), first largest column."""
    (tokens, width), step, targets = logits.shape, _row_step(logits), targets.contiguous()
    peak, total, at_target = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(3))
    best = torch.empty(tokens, dtype=torch.int64, device=logits.device)
    if tokens:
        block, warps = row_block(width)
        _statistics_kernel[(tokens,)](
            logits, targets, peak, total, at_target, best, width, step, HITS=hits, BLOCK=block, num_warps=warps
        )
    return peak, total, at_target, best


@torch.library.custom_op("minka::logit_gradient_", mutates_args=("logits",))
def _logit_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, peak: Tensor, total: Tensor, z_weight: float
) -> None:
    """peak and total: the largest logit of all ranks, and their sum of exponentials relative to it."""
    (tokens, width), step = logits.shape, _row_step(logits)
    targets, counts, peak, total = (x.contiguous() for x in (targets, counts, peak, total))
    if tokens:
        block, warps = row_block(width)
        _gradient_kernel[(tokens,)](
            logits, targets, counts, peak, total, width, step, z_weight, BLOCK=block, num_warps=warps
        )


def row_block(width: int) -> tuple[int, int]:
    """Columns that a program holds at once, and its warps.

    The wider a row, the more warps: fewer rows are then under way at once, so that a row is still in the second-level
    cache (50 MB on an H100) when it is read again.
    """
    warps = 32 if width > 2**16 else 16 if width > 2**14 else 8
    return min(LANES * warps, max(128, power_of_two(width))), warps


def _row_step(logits: Tensor) -> int:
    if logits.dtype not in DTYPES:
        raise ValueError(f"triton's cross-entropy takes logits in fp32, fp16 or bf16, not in {logits.dtype}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"the columns of logits must be next to each other, and their strides are {logits.stride()}")
    return logits.stride(0)


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, z_weight: float, gradient: bool, hits: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss), logits.new_empty(logits.shape[0] if hits else 0, dtype=torch.bool)


@_row_statistics.register_fake
def _(logits: Tensor, targets: Tensor, hits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    peak = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return peak, torch.empty_like(peak), torch.empty_like(peak), logits.new_empty(logits.shape[0], dtype=torch.int64)


@_logit_gradient.register_fake
def _(logits: Tensor, targets: Tensor, counts: Tensor, peak: Tensor, total: Tensor, z_weight: float) -> None:
    return None
