"""RMS norm over the last dimension (Zhang & Sennrich 2019), alone or after a residual addition.

T rows · N width

"torch": autograd's version reads and writes every activation four to eight times; this one two or three times, and it
saves only its inputs. "aten": torch's own kernel. "triton": a program holds whole rows in registers; backward, each of
a few programs sums the weight's gradient over its rows, and the sums are added in one order, so that two runs agree.
Half-precision inputs are computed in fp32 and rounded once, at the end.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide
from minka.kernels.launch import processors, rows_of
from minka.kernels.optional_triton import jit, power_of_two, tl

How = Literal["torch", "aten", "triton"]
WIDEST = 16384  # a wider row does not fit into the registers of a program
BACKWARD_WIDEST = 8192
TILE, BACKWARD_TILE = 4096, 2048  # elements that a program holds at once, of narrower rows


def rms_norm(x: Tensor, weight: Tensor, eps: float, how: How = "torch") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019), in x's dtype."""
    if how == "triton":
        return torch.ops.minka.rms_norm(x, weight, eps)[0]
    if torch.compiler.is_compiling():  # Inductor fuses the plain formula better than an operator
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    if how == "aten":  # by its own name: a dry run's tensors are on the CPU, where F.rms_norm does not take it
        return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, how: How = "torch") -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): one pass over both."""
    if how == "triton":
        y, total, _ = torch.ops.minka.add_rms_norm(x, residual, weight, eps)
        return y, total
    total = x + residual
    return rms_norm(total, weight, eps, how), total


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


# fmt: off
@jit
def _forward_kernel(
    X, R, W, S, Y, INV, rows, width, x_step, r_step, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(X + row[:, None] * x_step + column[None, :], mask=there, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(R + row[:, None] * r_step + column[None, :], mask=there, other=0.0).to(tl.float32)
        kept = x.to(S.dtype.element_ty)
        tl.store(S + row[:, None] * width + column[None, :], kept, mask=there)
        x = kept.to(tl.float32)  # the norm is that of the sum as it is kept
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / width + tl.cast(eps, tl.float32))
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * w[None, :]
    tl.store(Y + row[:, None] * width + column[None, :], y.to(Y.dtype.element_ty), mask=there)
    tl.store(INV + row, inverse, mask=row < rows)


@jit
def _backward_kernel(
    X, W, INV, DY, DS, DX, DW, rows, width, x_step, dy_step, ds_step, turns,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
    dw = tl.zeros((WIDTH,), dtype=tl.float32)
    for turn in range(turns):
        row = (program * turns + turn) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(X + row[:, None] * x_step + column[None, :], mask=there, other=0.0).to(tl.float32)
        dy = tl.load(DY + row[:, None] * dy_step + column[None, :], mask=there, other=0.0).to(tl.float32)
        inverse = tl.load(INV + row, mask=row < rows, other=0.0)
        unit = x * inverse[:, None]
        dw += tl.sum(dy * unit, axis=0)
        dy = dy * w[None, :]
        along = tl.sum(dy * unit, axis=1) / width  # how far the gradient points along x
        dx = (dy - unit * along[:, None]) * inverse[:, None]
        if ADD:
            dx += tl.load(DS + row[:, None] * ds_step + column[None, :], mask=there, other=0.0).to(tl.float32)
        tl.store(DX + row[:, None] * width + column[None, :], dx.to(DX.dtype.element_ty), mask=there)
    tl.store(DW + program * width + column, dw, mask=column < width)


@jit
def _wide_backward_kernel(
    X, W, INV, DY, DS, DX, DW, rows, width, x_step, dy_step, ds_step, turns, ADD: tl.constexpr, WIDTH: tl.constexpr,
):
    """The same for rows that do not fit into registers together with their sums: WIDTH of a row at a time, twice."""
    program = tl.program_id(0).to(tl.int64)
    for turn in range(turns):
        number = program * turns + turn
        row = tl.minimum(number, rows - 1)
        here = tl.where(number < rows, width, 0)  # columns of this row that count
        before = tl.where(number > program * turns, width, 0)  # columns that have a sum already
        inverse = tl.load(INV + row)
        along = tl.zeros((WIDTH,), dtype=tl.float32)
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
            x = tl.load(X + row * x_step + column, mask=column < width, other=0.0).to(tl.float32)
            dy = tl.load(DY + row * dy_step + column, mask=column < width, other=0.0).to(tl.float32)
            along += dy * w * x
        scale = tl.sum(along, axis=0) / width * inverse
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            w = tl.load(W + column, mask=column < width, other=0.0).to(tl.float32)
            x = tl.load(X + row * x_step + column, mask=column < width, other=0.0).to(tl.float32)
            dy = tl.load(DY + row * dy_step + column, mask=column < width, other=0.0).to(tl.float32)
            unit = x * inverse
            dx = (dy * w - unit * scale) * inverse
            if ADD:
                dx += tl.load(DS + row * ds_step + column, mask=column < width, other=0.0).to(tl.float32)
            tl.store(DX + row * width + column, dx.to(DX.dtype.element_ty), mask=column < here)
            sums = DW + program * width + column
            dw = tl.load(sums, mask=column < before, other=0.0)
            tl.store(sums, dw + tl.where(column < here, dy * unit, 0.0), mask=column < width)
# fmt: on


@torch.library.custom_op("minka::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, and the inverse norms [T] in fp32."""
    y, _, inverse = _forward(x, None, weight, eps)
    return y, inverse


@torch.library.custom_op("minka::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y and the sum like x, and the inverse norms [T] in fp32."""
    return _forward(x, residual, weight, eps)


@torch.library.custom_op("minka::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, d_y: Tensor, d_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; d_total is that of the sum, where it was kept."""
    flat, d_flat = rows_of(x), rows_of(d_y)
    d_sum = d_flat if d_total is None else rows_of(d_total)
    rows, width = flat.shape
    d_x = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    tile = backward_tile(rows, width)
    programs = max(1, min(processors(x.device), -(-rows // tile.rows)))
    turns = -(-rows // (programs * tile.rows))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    arguments = (
        flat, weight.contiguous(), inverse, d_flat, d_sum, d_x, sums, rows, width, flat.stride(0), d_flat.stride(0),
        d_sum.stride(0), turns,
    )  # fmt: skip
    add, columns, warps = d_total is not None, tile.columns, tile.warps
    if tile.columns < width:
        _wide_backward_kernel[(programs,)](*arguments, ADD=add, WIDTH=columns, num_warps=warps)
    else:
        _backward_kernel[(programs,)](*arguments, ADD=add, ROWS=tile.rows, WIDTH=columns, num_warps=warps)
    return d_x.view(x.shape), sums.sum(dim=0).to(weight.dtype)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    flat = rows_of(x)
    other = flat if residual is None else rows_of(residual)
    rows, width = flat.shape
    y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = forward_tile(rows, width)
    _forward_kernel[(max(1, -(-rows // tile.rows)),)](
        flat, other, weight.contiguous(), total, y, inverse, rows, width, flat.stride(0), other.stride(0), eps,
        ADD=residual is not None, ROWS=tile.rows, WIDTH=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return y.view(x.shape), total.view(x.shape), inverse


class RowTile(NamedTuple):
    """Rows and columns that a program holds at once, and the warps that share them."""

    rows: int
    columns: int
    warps: int


def forward_tile(rows: int, width: int) -> RowTile:
    """The tile of a forward pass over [rows, width]. Raises ValueError for rows that no tile holds."""
    if width > WIDEST:
        raise ValueError(f"the triton kernel of rms_norm takes rows of at most {WIDEST} elements, not {width}")
    return _tile_of(rows, power_of_two(width), TILE)


def backward_tile(rows: int, width: int) -> RowTile:
    """Less, for the gradients and their sums take registers too; half a row or less where it is very wide."""
    return _tile_of(rows, min(power_of_two(width), BACKWARD_WIDEST), BACKWARD_TILE)


def _tile_of(rows: int, columns: int, tile: int) -> RowTile:
    high = max(1, min(tile // columns, power_of_two(rows)))
    return RowTile(high, columns, max(4, min(32, high * columns // 128)))


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _inverse_like(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), _inverse_like(x)


@_rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, inverse: Tensor, d_y: Tensor, d_total: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _inverse_like(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[-1])
    ctx.mark_non_differentiable(output[-1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, inverse = ctx.saved_tensors
    return *torch.ops.minka.rms_norm_backward(x, weight, inverse, d_y, None), None


def _gradients_of_sum(ctx: Any, d_y: Tensor, d_total: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, inverse = ctx.saved_tensors
    d_x, d_weight = torch.ops.minka.rms_norm_backward(total, weight, inverse, d_y, d_total)
    return d_x, d_x, d_weight, None


torch.library.register_autograd("minka::rms_norm", _gradients, setup_context=_save)
torch.library.register_autograd("minka::add_rms_norm", _gradients_of_sum, setup_context=_save_sum)
