"""The squared norm over many tensors in one pass: a sum for each part of each, and their sum in one order, in fp64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minka.kernels.many_tensors import CHUNK, WARPS, Chunks, addresses
from minka.kernels.optional_triton import jit, tl


def squares_of_all(tensors: Sequence[Tensor], factors: Tensor, chunks: Chunks) -> Tensor:
    """Sum over the tensors of factor * its squared norm; scalar in fp64 on their device.

    factors: fp64 [tensors] on the device. Squares are added up in fp32 within a chunk. fp32 tensors without gaps.
    """
    found: Tensor = torch.ops.minka.squared_norm(list(tensors), factors, *chunks)
    return found


# fmt: off
@jit
def _kernel(AT, WHICH, FIRST, SIZES, FACTORS, SUMS, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(WHICH + program)
    x = tl.load(AT + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    element = tl.load(FIRST + program) + tl.arange(0, CHUNK)
    x = tl.load(x + element, mask=element < tl.load(SIZES + tensor), other=0.0)
    tl.store(SUMS + program, tl.sum(x * x, axis=0).to(tl.float64) * tl.load(FACTORS + tensor))
# fmt: on


@torch.library.custom_op("minka::squared_norm", mutates_args=())
def _squared_norm(tensors: list[Tensor], factors: Tensor, which: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    check_fp32(tensors, "squared_norm")
    sums = torch.empty(len(which), dtype=torch.float64, device=factors.device)
    if len(which):
        at, aligned = addresses([tensors], factors.device)
        _kernel[(len(which),)](at, which, first, sizes, factors, sums, ALIGNED=aligned, CHUNK=CHUNK, num_warps=WARPS)
    return sums.sum()


@_squared_norm.register_fake
def _(tensors: list[Tensor], factors: Tensor, which: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    return factors.new_empty(())


def check_fp32(tensors: Sequence[Tensor], operation: str) -> None:
    other = {str(t.dtype).removeprefix("torch.") for t in tensors} - {"float32"}
    if other:
        raise ValueError(f"triton's {operation} takes tensors in fp32, not in {' and '.join(sorted(other))}")
