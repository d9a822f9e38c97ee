"""Three small operations of a block, each with its own backward: RMS norm, rotation of head channels, SwiGLU.

Autograd's versions read and write every activation four to eight times; these do so two or three times, and save
only their inputs. Under torch.compile the plain formulas are used, which Inductor fuses better than we can.
Half-precision inputs are computed in fp32 and rounded once, at the end.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019), in x's dtype."""
    if torch.compiler.is_compiling() or x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


def rotate(x_BTHC: Tensor, cos_BT1C: Tensor, sin_BT1C: Tensor) -> Tensor:
    """x * cos + swap(x) * sin, where swap exchanges the two halves of the channels.

    `sin` carries the signs of a rotation: minus in its first half, plus in its second.
    """
    if torch.compiler.is_compiling():
        return (wide(x_BTHC) * cos_BT1C + _swap(wide(x_BTHC)) * sin_BT1C).to(x_BTHC.dtype)
    return _Rotate.apply(x_BTHC, cos_BT1C, sin_BT1C)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums and products are taken in: fp32 for half precision, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _swap(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide_x = wide(x)
        norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide_x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        wide_x, wide_grad, wide_weight = wide(x), wide(grad), wide(weight)
        product = wide_grad * wide_x
        rows = product.reshape(-1, width)
        d_weight = torch.mv(rows.t(), inverse.reshape(-1))
        along = torch.mv(rows, wide_weight).view_as(inverse)  # how far the gradient points along x
        scale = inverse.pow(3).mul_(along).div_(-width)
        d_x = torch.mul(wide_grad, wide_weight, out=product).mul_(inverse).addcmul_(wide_x, scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up
