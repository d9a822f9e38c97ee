"""The dtype of sums and products, which is at least fp32."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32 where it is half precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
