"""The dtype that sums and products are taken in, whatever the dtype that tensors are kept in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32 where it is half precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
