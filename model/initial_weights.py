"""Initial weights as a function of (seed, parameter name, global index) alone: any slice, on any device, bit for bit.

A counter is hashed to 52 bits in integer arithmetic. They pick a place in a table of the normal quantile, truncated at
three sigma, and one multiplication and one addition in fp64 interpolate between its entries. Integer operations and
single IEEE roundings have one right answer everywhere; a library's sine, logarithm or generator has several.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from minka.kernels.random_bits import mix, shift_right
from minka.plan.config_sections import ModelSection

SIGMAS = 3.0  # truncation
CELLS_LOG2 = 12
FRACTION_BITS = 40
CHUNK = 2**18  # elements at once: a few buffers of 2 MiB


@torch.no_grad()
def fill_(
    local: Tensor, name: str, seed: int, cfg: ModelSection, *, offset: Sequence[int], global_shape: Sequence[int]
) -> None:
    """Set `local` to the box of parameter `name` that begins at `offset` in the whole tensor of `global_shape`.

    Norms are 1, biases 0, matrices normal with sigma `init_std`, truncated at 3 sigma; with a smaller sigma for what
    writes to the residual stream, the deeper the model.
    """
    if name.endswith(("norm.weight", ".bias")) or local.numel() == 0:
        local.fill_(float(name.endswith("norm.weight")))
        return
    writes_to_stream = name.endswith(("attention.wo.weight", "mlp.down.weight"))
    sigma = cfg.init_std / math.sqrt(2 * cfg.layers) if writes_to_stream else cfg.init_std
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)
    table = torch.tensor(_quantiles(), dtype=torch.float64, device=local.device)
    rows = max(1, CHUNK // math.prod(local.shape[1:]))
    for begin in range(0, local.shape[0], rows):
        part = local[begin : begin + rows]
        index = global_index(part, (offset[0] + begin, *offset[1:]), global_shape)
        part.copy_(_normal(index, key, table) * sigma)


def global_index(box: Tensor, offset: Sequence[int], global_shape: Sequence[int]) -> Tensor:
    """Row-major index in the whole tensor of each element of the box."""
    index = torch.zeros((), dtype=torch.int64, device=box.device)
    stride = 1
    for dim in reversed(range(box.ndim)):
        along = torch.arange(offset[dim], offset[dim] + box.shape[dim], device=box.device) * stride
        index = index + along.view(-1, *[1] * (box.ndim - 1 - dim))
        stride *= global_shape[dim]
    return index


def _normal(index: Tensor, key: int, table: Tensor) -> Tensor:
    """Truncated standard normal numbers in fp64 for int64 counters."""
    bits = mix(index, key)
    cell = shift_right(bits, 64 - CELLS_LOG2)
    places = shift_right(bits, 64 - CELLS_LOG2 - FRACTION_BITS) & (2**FRACTION_BITS - 1)
    fraction = places.double() * 2.0**-FRACTION_BITS
    low = table[cell]
    # Two calls, so that no compiler contracts them into one with a single rounding.
    return (table[cell + 1] - low).mul_(fraction).add_(low)


@functools.cache
def _quantiles() -> tuple[float, ...]:
    """Quantile function of the truncated normal at cell borders; rounded: the last bit of libm has no effect."""
    normal = NormalDist()
    first = normal.cdf(-SIGMAS)
    cells = 2**CELLS_LOG2
    lower = [normal.inv_cdf(first + (1 - 2 * first) * i / cells) for i in range(1, cells // 2)]
    lower = [-SIGMAS, *(round(x * 2**32) / 2**32 for x in lower)]
    return (*lower, 0.0, *(-x for x in reversed(lower)))
