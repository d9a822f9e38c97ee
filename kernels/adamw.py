"""AdamW (Loshchilov & Hutter 2019, algorithm 2) over many tensors in one launch, with clipping and refusal in it.

Weights and moments are fp32 or bf16. An update is computed in fp32; what is stored in bf16 is rounded stochastically,
with bits that follow from step, tensor and global index: a rank's box of a tensor gets the bits that the whole would.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minka.kernels.many_tensors import CHUNK, WARPS, Chunks, addresses, check_one_dtype
from minka.kernels.optional_triton import jit, tl
from minka.kernels.random_bits import load_kernel, mix, mix_kernel, round_kernel, round_to_bf16

PART = 2**18  # elements that the definition has in fp32 at once: a few buffers of 1 MiB


class Coefficients(NamedTuple):
    """Of an update; the decay of a weight is its own."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float


class Box(NamedTuple):
    """The elements of a whole tensor that a local one of two dimensions or fewer holds, and the tensor's key."""

    key: int  # of the random bits, signed 64 bits
    first: int  # index in the whole tensor of the first element
    columns: int  # of a local row
    gap: int  # elements between the end of a local row and the start of the next one in the whole tensor

    @classmethod
    def of(cls, key: int, offset: Sequence[int], shape: Sequence[int], global_shape: Sequence[int]) -> "Box":
        """The box of `shape` at `offset` in a tensor of `global_shape`."""
        if len(shape) > 2:
            raise ValueError(f"a tensor of shape {tuple(global_shape)} has more than two dimensions")
        (row, column), columns, whole = (0, *offset)[-2:], shape[-1], global_shape[-1]
        return cls(key, row * whole + column, max(columns, 1), whole - columns)


def adamw_(
    tensors: Mapping[str, Sequence[Tensor]],
    chunks: Chunks,
    decays: Tensor,
    boxes: Tensor,
    count: Tensor,
    divisor: Tensor,
    accept: Tensor,
    coefficients: Coefficients,
    how: Literal["torch", "triton"],
) -> None:
    """Update weights and moments, or change no bit where `accept` is false.

    tensors: "weights", "moments1", "moments2" and "gradients", each in the same order, without gaps; weights are all in
    fp32 or all in bf16, so are both moments, and so are gradients. The gradient that counts is gradient / divisor.
    decays: fp32 [tensors]. boxes: int64 [4, tensors], the fields of Box. count: this step's number, from 1. divisor and
    accept are scalars; all are on the device, and the host waits for none.
    """
    lists = [list(tensors[name]) for name in ("weights", "moments1", "moments2", "gradients")]
    for name, some in zip(tensors, lists, strict=True):
        check_one_dtype(some, f"adamw's {name}")
    check_one_dtype([*lists[1], *lists[2]], "adamw's moments")
    if how == "triton":
        torch.ops.minka.adamw_(*lists, *chunks, decays, boxes, count, divisor, accept, *coefficients)
    else:
        _define(lists, decays, boxes, count, divisor, accept, coefficients)


def _define(
    lists: Sequence[Sequence[Tensor]],
    decays: Tensor,
    boxes: Tensor,
    count: Tensor,
    divisor: Tensor,
    accept: Tensor,
    coefficients: Coefficients,
) -> None:
    corrections, keys = _corrections(count, coefficients.beta1, coefficients.beta2), mix(count.long(), boxes[0])
    for number, (w, m, v, g) in enumerate(zip(*lists, strict=True)):
        _, first, columns, gap = boxes[:, number]
        for begin in range(0, w.numel(), PART):
            flat = [tensor.view(-1)[begin : begin + PART] for tensor in (w, m, v, g)]
            element = torch.arange(begin, begin + len(flat[0]), device=w.device)
            bits = mix(first + element + element // columns * gap, keys[number])
            w32, m32, v32, g32 = (x.float() for x in flat)
            found = _updated(w32, m32, v32, g32 / divisor, decays[number], corrections, coefficients)
            for shift, stored, x in zip((0, 16, 32), flat[:3], found, strict=True):
                rounded = round_to_bf16(x, bits >> shift) if stored.dtype == torch.bfloat16 else x
                stored.copy_(torch.where(accept, rounded, stored))


def _updated(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, decay: Tensor, corrections: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after the step, in fp32."""
    w = w - c.learning_rate * decay * w
    m = m + (1 - c.beta1) * (g - m)
    v = c.beta2 * v + (1 - c.beta2) * g * g
    return w - c.learning_rate * corrections[0] * m / (v.sqrt() * corrections[1] + c.eps), m, v


def _corrections(count: Tensor, beta1: float, beta2: float) -> Tensor:
    """Factors against the bias of m and of sqrt(v), fp32 [2]. 1 - 0.999 in fp32 has three digits fewer: in fp64."""
    steps = count.double()
    return torch.stack((1 / (1 - beta1**steps), (1 - beta2**steps).rsqrt())).float()


# fmt: off
@jit
def _kernel(
    AT, WHICH, FIRST, SIZES, DECAYS, KEYS, BOXES, CORRECTIONS, DIVISOR, ACCEPT, tensors, rate, rest1, beta2, rest2, eps,
    WEIGHTS16: tl.constexpr, MOMENTS16: tl.constexpr, GRADIENTS16: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if tl.load(ACCEPT) != 0:
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(WHICH + program)
        weights = tl.load(AT + tensor).to(tl.pointer_type(tl.int16 if WEIGHTS16 else tl.float32))
        moments1 = tl.load(AT + tensors + tensor).to(tl.pointer_type(tl.int16 if MOMENTS16 else tl.float32))
        moments2 = tl.load(AT + 2 * tensors + tensor).to(tl.pointer_type(tl.int16 if MOMENTS16 else tl.float32))
        gradients = tl.load(AT + 3 * tensors + tensor).to(tl.pointer_type(tl.int16 if GRADIENTS16 else tl.float32))
        if ALIGNED:
            weights, moments1 = tl.multiple_of(weights, 16), tl.multiple_of(moments1, 16)
            moments2, gradients = tl.multiple_of(moments2, 16), tl.multiple_of(gradients, 16)
        rate, beta2 = tl.cast(rate, tl.float32), tl.cast(beta2, tl.float32)
        first = tl.load(FIRST + program)
        element = first + tl.arange(0, CHUNK)
        there = element < tl.load(SIZES + tensor)
        w = load_kernel(weights + element, there, WEIGHTS16)
        m = load_kernel(moments1 + element, there, MOMENTS16)
        v = load_kernel(moments2 + element, there, MOMENTS16)
        g = load_kernel(gradients + element, there, GRADIENTS16) / tl.load(DIVISOR)
        w -= rate * tl.load(DECAYS + tensor) * w
        m += tl.cast(rest1, tl.float32) * (g - m)
        v = beta2 * v + tl.cast(rest2, tl.float32) * g * g
        denominator = tl.sqrt(v) * tl.load(CORRECTIONS + 1) + tl.cast(eps, tl.float32)
        w -= rate * tl.load(CORRECTIONS) * m / denominator
        if WEIGHTS16 or MOMENTS16:
            columns, gap = tl.load(BOXES + 2 * tensors + tensor), tl.load(BOXES + 3 * tensors + tensor)
            index = tl.load(BOXES + tensors + tensor) + element
            if gap != 0:  # rows within a chunk are few: their numbers fit 32 bits, and dividing 64 is slow
                row = first // columns
                within = (first - row * columns).to(tl.int32) + tl.arange(0, CHUNK)
                index += (row + within // columns.to(tl.int32)) * gap
            bits = mix_kernel(index, tl.load(KEYS + tensor))
        tl.store(weights + element, round_kernel(w, bits) if WEIGHTS16 else w, mask=there)
        tl.store(moments1 + element, round_kernel(m, bits >> 16) if MOMENTS16 else m, mask=there)
        tl.store(moments2 + element, round_kernel(v, bits >> 32) if MOMENTS16 else v, mask=there)
# fmt: on


@torch.library.custom_op("minka::adamw_", mutates_args=("weights", "moments1", "moments2"))
def _adamw(
    weights: list[Tensor], moments1: list[Tensor], moments2: list[Tensor], gradients: list[Tensor], which: Tensor,
    first: Tensor, sizes: Tensor, decays: Tensor, boxes: Tensor, count: Tensor, divisor: Tensor, accept: Tensor,
    learning_rate: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    if not len(which):
        return
    corrections, keys = _corrections(count, beta1, beta2), mix(count.long(), boxes[0])
    at, aligned = addresses([weights, moments1, moments2, gradients], decays.device)
    halves = {
        f"{name}16": some[0].dtype == torch.bfloat16
        for name, some in (("WEIGHTS", weights), ("MOMENTS", moments1), ("GRADIENTS", gradients))
    }
    _kernel[(len(which),)](
        at, which, first, sizes, decays, keys, boxes, corrections, divisor.float(), accept, len(weights), learning_rate,
        1 - beta1, beta2, 1 - beta2, eps, **halves, ALIGNED=aligned, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip


@_adamw.register_fake
def _(
    weights: list[Tensor], moments1: list[Tensor], moments2: list[Tensor], gradients: list[Tensor], which: Tensor,
    first: Tensor, sizes: Tensor, decays: Tensor, boxes: Tensor, count: Tensor, divisor: Tensor, accept: Tensor,
    learning_rate: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    return None
