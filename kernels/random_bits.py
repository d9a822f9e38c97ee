"""Random bits that follow from a key and an index alone, and fp32 rounded to bf16 with them (stochastic rounding).

splitmix64 (Steele et al. 2014): integer operations have one right answer on every device and under every layout.

A rounded number goes to one of its two neighbours, to the nearer one more often: the expected value is the number
itself. To nearest, an update below half a step of bf16 (0.2 to 0.4 % of the weight) would be lost, every time.
"""

import torch
from torch import Tensor

from minka.kernels.optional_triton import jit, tl

# As signed 64-bit numbers.
GOLDEN, MIX_1, MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(index: Tensor, key: int | Tensor) -> Tensor:
    """splitmix64's output number `index` (int64) from the state `key`: 64 bits as int64."""
    z = (index + 1) * GOLDEN + key
    z = (z ^ shift_right(z, 30)) * MIX_1
    z = (z ^ shift_right(z, 27)) * MIX_2
    return z ^ shift_right(z, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: its own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """x (fp32) as bf16, away from zero where its last 16 bits plus the last 16 of `bits` (int64) carry. NaN stays."""
    more = torch.where(x.isnan(), 0, bits & 0xFFFF).int()  # a carry out of a NaN of all ones would make it -0
    return ((x.view(torch.int32) + more) >> 16).to(torch.int16).view(torch.bfloat16)


# fmt: off
@jit
def mix_kernel(index, key):
    """The same in a kernel."""
    z = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def round_kernel(x, bits):
    """The same in a kernel, as int16: Triton's interpreter cuts bf16 off."""
    more = tl.where(x == x, (bits & 0xFFFF).to(tl.uint32), 0)
    return ((x.to(tl.uint32, bitcast=True) + more) >> 16).to(tl.int16)


@jit
def load_kernel(at, mask, BF16: tl.constexpr):
    """fp32 of what is stored at `at`: fp32, or bf16 as int16."""
    if BF16:
        bits = tl.load(at, mask=mask, other=0).to(tl.uint16, bitcast=True)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x
# fmt: on
