"""SwiGLU (Shazeer 2020), which keeps only its two inputs for backward and recomputes the rest."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.launch import rows_of
from minka.kernels.optional_triton import jit, power_of_two, tl

How = Literal["torch", "triton"]
TILE = 1024  # elements that a program computes


def swiglu(gate: Tensor, up: Tensor, how: How = "torch") -> Tensor:
    """silu(gate) * up, in their dtype."""
    if how == "triton":
        return torch.ops.minka.swiglu(gate, up)
    if torch.compiler.is_compiling():  # Inductor fuses the plain formula
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


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


# fmt: off
@jit
def _forward_kernel(
    G, U, Y, rows, width, g_step, u_step, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    there = (row < rows) & (column < width)
    gate = tl.load(G + row * g_step + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(U + row * u_step + column, mask=there, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=there)


@jit
def _backward_kernel(
    G, U, DY, DG, DU, rows, width, g_step, u_step, dy_step, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    there = (row < rows) & (column < width)
    gate = tl.load(G + row * g_step + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(U + row * u_step + column, mask=there, other=0.0).to(tl.float32)
    dy = tl.load(DY + row * dy_step + column, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(DG + row * width + column, d_gate.to(DG.dtype.element_ty), mask=there)
    tl.store(DU + row * width + column, (dy * silu).to(DU.dtype.element_ty), mask=there)
# fmt: on


@torch.library.custom_op("minka::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    g, u = rows_of(gate), rows_of(up)
    rows, width = g.shape
    y = torch.empty(g.shape, dtype=gate.dtype, device=gate.device)
    high, wide = tile(width)
    grid = -(-rows // high), -(-width // wide)
    if rows:
        _forward_kernel[grid](g, u, y, rows, width, g.stride(0), u.stride(0), ROWS=high, WIDTH=wide, num_warps=4)
    return y.view(gate.shape)


@torch.library.custom_op("minka::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    g, u, dy = rows_of(gate), rows_of(up), rows_of(d_y)
    rows, width = g.shape
    d_gate, d_up = (torch.empty(g.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    high, wide = tile(width)
    if rows:
        _backward_kernel[-(-rows // high), -(-width // wide)](
            g, u, dy, d_gate, d_up, rows, width, g.stride(0), u.stride(0), dy.stride(0),
            ROWS=high, WIDTH=wide, num_warps=4,
        )  # fmt: skip
    return d_gate.view(gate.shape), d_up.view(up.shape)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns that a program computes: several rows only where they are narrow."""
    columns = min(TILE, power_of_two(width))
    return TILE // columns, columns


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.minka.swiglu_backward(*ctx.saved_tensors, d_y)


torch.library.register_autograd("minka::swiglu", _gradients, setup_context=_save)
