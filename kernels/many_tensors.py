"""What kernels over many tensors in one launch are given: where the tensors are, and which part each program has."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK, WARPS = 4096, 8  # elements that a program has


class Chunks(NamedTuple):
    """Program i has the elements [first[i], first[i] + CHUNK) of tensor which[i]; on the device, made once."""

    which: Tensor  # int32 [programs]
    first: Tensor  # int64 [programs]
    sizes: Tensor  # int64 [tensors]

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> "Chunks":
        """For tensors of so many elements; those without any have no program."""
        numbers = [-(-size // CHUNK) for size in sizes]
        counts = torch.tensor(numbers, dtype=torch.int64)
        which = torch.arange(len(sizes)).repeat_interleave(counts, output_size=sum(numbers))
        before = counts.cumsum(0) - counts
        first = (torch.arange(sum(numbers)) - before[which]) * CHUNK
        return cls(which.int().to(device), first.to(device), torch.tensor(list(sizes), dtype=torch.int64).to(device))


def addresses(lists: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """int64 [lists, tensors] on the device, and whether all are multiples of 16; the host waits for nothing.

    Raises ValueError for tensors with gaps.
    """
    gaps = next((t for tensors in lists for t in tensors if not t.is_contiguous()), None)
    if gaps is not None:
        raise ValueError(f"a tensor of shape {tuple(gaps.shape)} has gaps: its strides are {gaps.stride()}")
    found = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    # A fresh pinned tensor each time: torch keeps it until the copy is done.
    on_host = torch.tensor(found, dtype=torch.int64, pin_memory=device.type == "cuda")
    aligned = all(address % 16 == 0 for row in found for address in row)
    return on_host.to(device, non_blocking=True), aligned


def check_one_dtype(tensors: Sequence[Tensor], what: str) -> None:
    """Raise ValueError unless all are in fp32, or all in bf16."""
    found = {str(t.dtype).removeprefix("torch.") for t in tensors}
    if found - {"float32"} and found - {"bfloat16"}:
        raise ValueError(f"{what} are all in fp32 or all in bf16, not in {' and '.join(sorted(found))}")
