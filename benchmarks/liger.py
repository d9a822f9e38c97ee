"""Liger-Kernel's operations (Hsu et al. 2024, arXiv:2410.10989) under the signatures of our cases, where installed."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Way = Callable[..., Outputs]


def liger_ways(eps: float, z_weight: float) -> Mapping[str, Way]:
    """{operation: function}; empty where the package is not installed."""
    if find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(x: Tensor, added: Tensor, weight: Tensor) -> Outputs:
        found: Outputs = LigerFusedAddRMSNormFunction.apply(x, added, weight, eps, 0.0, "llama", False)
        return found

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        """In place, and heads before tokens."""
        half = sin.shape[-1] // 2
        tables = cos[:, :, 0], torch.cat((sin[:, :, 0, half:],) * 2, -1)
        found: Outputs = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return tuple(x.transpose(1, 2) for x in found)

    def swiglu(gate: Tensor, up: Tensor) -> Outputs:
        return (LigerSiLUMulFunction.apply(gate, up),)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Outputs:
        """Writes the gradient over the logits where they have one."""
        with torch.enable_grad():
            learned: Any = logits.detach().requires_grad_()
            rest = None, -100, z_weight, 0.0, "sum", None, True
            loss, z_loss, *_ = LigerCrossEntropyFunction.apply(learned, targets, *rest)
        return loss.detach(), z_loss.detach(), logits

    return {"rms_norm": norm, "rope": rope, "swiglu": swiglu, "cross_entropy": cross_entropy}
