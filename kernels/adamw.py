"""AdamW (Loshchilov & Hutter 2019, algorithm 2) over many tensors in one launch, with clipping and refusal in it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minka.kernels.many_tensors import CHUNK, WARPS, Chunks, addresses
from minka.kernels.optional_triton import jit, tl
from minka.kernels.squared_norm import check_fp32


class Coefficients(NamedTuple):
    """Of an update; the decay of a weight is its own."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float


def adamw_(
    tensors: Mapping[str, Sequence[Tensor]],
    chunks: Chunks,
    decays: Tensor,
    count: Tensor,
    divisor: Tensor,
    accept: Tensor,
    coefficients: Coefficients,
) -> None:
    """Update weights and moments, or change no bit where `accept` is false.

    tensors: "weights", "moments1", "moments2" and "gradients", each in the same order, fp32 without gaps; the gradient
    that counts is gradient / divisor. decays: fp32 [tensors]. count: this step's number, from 1. divisor and accept are
    scalars; all are on the device, and the host waits for none.
    """
    lists = (list(tensors[name]) for name in ("weights", "moments1", "moments2", "gradients"))
    torch.ops.minka.adamw_(*lists, *chunks, decays, count, divisor, accept, *coefficients)


# fmt: off
@jit
def _kernel(
    AT, WHICH, FIRST, SIZES, DECAYS, CORRECTIONS, DIVISOR, ACCEPT, tensors, rate, rest1, beta2, rest2, eps,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):
    if tl.load(ACCEPT) != 0:
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(WHICH + program)
        weights = tl.load(AT + tensor).to(tl.pointer_type(tl.float32))
        moments1 = tl.load(AT + tensors + tensor).to(tl.pointer_type(tl.float32))
        moments2 = tl.load(AT + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
        gradients = tl.load(AT + 3 * tensors + tensor).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            weights, moments1 = tl.multiple_of(weights, 16), tl.multiple_of(moments1, 16)
            moments2, gradients = tl.multiple_of(moments2, 16), tl.multiple_of(gradients, 16)
        rate, beta2 = tl.cast(rate, tl.float32), tl.cast(beta2, tl.float32)
        element = tl.load(FIRST + program) + tl.arange(0, CHUNK)
        there = element < tl.load(SIZES + tensor)
        w = tl.load(weights + element, mask=there, other=0.0)
        m = tl.load(moments1 + element, mask=there, other=0.0)
        v = tl.load(moments2 + element, mask=there, other=0.0)
        g = tl.load(gradients + element, mask=there, other=0.0) / tl.load(DIVISOR)
        w -= rate * tl.load(DECAYS + tensor) * w
        m += tl.cast(rest1, tl.float32) * (g - m)
        v = beta2 * v + tl.cast(rest2, tl.float32) * g * g
        denominator = tl.sqrt(v) / tl.load(CORRECTIONS + 1) + tl.cast(eps, tl.float32)
        w -= rate / tl.load(CORRECTIONS) * m / denominator
        tl.store(weights + element, w, mask=there)
        tl.store(moments1 + element, m, mask=there)
        tl.store(moments2 + element, v, mask=there)
# fmt: on


@torch.library.custom_op("minka::adamw_", mutates_args=("weights", "moments1", "moments2"))
def _adamw(
    weights: list[Tensor], moments1: list[Tensor], moments2: list[Tensor], gradients: list[Tensor], which: Tensor,
    first: Tensor, sizes: Tensor, decays: Tensor, count: Tensor, divisor: Tensor, accept: Tensor, learning_rate: float,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    check_fp32([*weights, *moments1, *moments2, *gradients], "adamw")
    if not len(which):
        return
    # In fp64, as all that is 1 - beta: 1 - 0.999 has three digits fewer than its parts.
    steps = count.double()
    corrections = torch.stack((1 - beta1**steps, (1 - beta2**steps).sqrt())).float()
    at, aligned = addresses([weights, moments1, moments2, gradients], decays.device)
    _kernel[(len(which),)](
        at, which, first, sizes, decays, corrections, divisor.float(), accept, len(weights), learning_rate, 1 - beta1,
        beta2, 1 - beta2, eps, ALIGNED=aligned, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip


@_adamw.register_fake
def _(
    weights: list[Tensor], moments1: list[Tensor], moments2: list[Tensor], gradients: list[Tensor], which: Tensor,
    first: Tensor, sizes: Tensor, decays: Tensor, count: Tensor, divisor: Tensor, accept: Tensor, learning_rate: float,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    return None
