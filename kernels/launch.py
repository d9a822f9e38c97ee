"""What launches of kernels share."""

from functools import cache

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, width], its elements next to each other within a row; a copy only where strides demand it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


@cache
def processors(device: torch.device) -> int:
    """Programs that run at once: multiprocessors of a GPU; in the interpreter two, so that sums of both are added."""
    return 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def inner_contiguous(x: Tensor) -> Tensor:
    """x with elements of the last dimension next to each other; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
