"""The squared norm over many tensors in one pass: a sum for each part of each, and their sum in one order, in fp64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minka.kernels.many_tensors import CHUNK, WARPS, Chunks, addresses, check_one_dtype
from minka.kernels.optional_triton import jit, tl
from minka.kernels.random_bits import load_kernel


def squares_of_all(tensors: Sequence[Tensor], factors: Tensor, chunks: Chunks) -> Tensor:
    """Sum over the tensors of factor * its squared norm; scalar in fp64 on their device.

    factors: fp64 [tensors] on the device. Squares are added up in fp32 within a chunk. Tensors have no gaps; all are in
    fp32 or all in bf16.
    """
    found: Tensor = torch.ops.minka.squared_norm(list(tensors), factors, *chunks)
    return found


# fmt: off
@jit
def _kernel(AT, WHICH, FIRST, SIZES, FACTORS, SUMS, BF16: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(WHICH + program)
    x = tl.load(AT + tensor).to(tl.pointer_type(tl.int16 if BF16 else tl.float32))
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    element = tl.load(FIRST + program) + tl.arange(0, CHUNK)
    x = load_kernel(x + element, element < tl.load(SIZES + tensor), BF16)
    tl.store(SUMS + program, tl.sum(x * x, axis=0).to(tl.float64) * tl.load(FACTORS + tensor))
# fmt: on


@torch.library.custom_op("minka::squared_norm", mutates_args=())
def _squared_norm(tensors: list[Tensor], factors: Tensor, which: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    check_one_dtype(tensors, "squared_norm's tensors")
    sums = torch.empty(len(which), dtype=torch.float64, device=factors.device)
    if len(which):
        at, aligned = addresses([tensors], factors.device)
        constants = {"BF16": tensors[0].dtype == torch.bfloat16, "ALIGNED": aligned, "CHUNK": CHUNK}
        _kernel[(len(which),)](at, which, first, sizes, factors, sums, **constants, num_warps=WARPS)
    return sums.sum()


@_squared_norm.register_fake
def _(tensors: list[Tensor], factors: Tensor, which: Tensor, first: Tensor, sizes: Tensor) -> Tensor:
    return factors.new_empty(())
