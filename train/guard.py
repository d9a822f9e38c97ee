"""Enacts plan/guard.py: the same rule on the device, where it gates the update without waiting for the host."""

import torch
from torch import Tensor

from minka.parallel.engine import Sums


def accepts(sums: Sums, grad_norm: Tensor) -> Tensor:
    """Scalar bool on the device: finite loss and finite gradient norm, all over the mesh (both are global numbers)."""
    return torch.isfinite(sums.loss) & torch.isfinite(sums.z_loss) & torch.isfinite(grad_norm)
