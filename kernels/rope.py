"""Rotation of head channels, the heart of RoPE (Su et al. 2021); its backward is the opposite rotation.

Under torch.compile the plain formula is used. Half-precision inputs are rotated in fp32 and rounded once, at the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide


def rotate(x_BTHC: Tensor, cos_BT1C: Tensor, sin_BT1C: Tensor) -> Tensor:
    """x * cos + swap(x) * sin, where swap exchanges the two halves of the channels.

    `sin` carries the signs of a rotation: minus in its first half, plus in its second.
    """
    if torch.compiler.is_compiling():
        return (wide(x_BTHC) * cos_BT1C + _swap(wide(x_BTHC)) * sin_BT1C).to(x_BTHC.dtype)
    return _Rotate.apply(x_BTHC, cos_BT1C, sin_BT1C)


def _swap(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        wide_x = wide(x)
        return _swap(wide_x).mul_(sin).addcmul_(wide_x, cos).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        wide_grad = wide(grad)
        return _swap(wide_grad * sin).addcmul_(wide_grad, cos).to(grad.dtype), None, None
