"""Rotation of query and key channels together, the heart of RoPE (Su et al. 2021).

B batch · T tokens · H query heads · K key heads · C head width, channels in the half-split order

The tables are cos [B, T, 1, C] and sin [B, T, 1, C] of every token's position, in fp32; sin carries the signs of a
rotation: minus in its first half, plus in its second. Half-precision inputs are computed in fp32 and rounded once, at
the end. Backward is the opposite rotation, and saves no activation.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide
from minka.kernels.launch import inner_contiguous
from minka.kernels.optional_triton import jit, power_of_two, tl

How = Literal["torch", "triton"]
TILE = 2048  # elements of heads that a program holds at once


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, how: How = "torch") -> tuple[Tensor, Tensor]:
    """x * cos + swap(x) * sin of q [B, T, H, C] and k [B, T, K, C]; swap exchanges the halves of the channels."""
    if how == "triton":
        return torch.ops.minka.rope(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x_BTHC: Tensor, cos_BT1C: Tensor, sin_BT1C: Tensor) -> Tensor:
    """x * cos + swap(x) * sin of one tensor."""
    if torch.compiler.is_compiling():  # Inductor fuses the plain formula
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


# fmt: off
@jit
def halves_at(X, row, heads, tokens, step_batch, step_token, step_head):
    """Pointers to the heads of some rows [R, 1], counted over tokens and the heads of each."""
    token = row // heads
    batch, place = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    return (X + batch * step_batch + place * step_token + (row % heads).to(tl.int64) * step_head)[:, None]


@jit
def _turn_rows(
    X, Y, COS, SIN, W, block, rows, heads, tokens, width, eps, sign,
    x_batch, x_token, x_head, table_batch, table_token,
    NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):
    """ROWS heads: the norm of each, then its rotation."""
    row = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HALF)
    half = width // 2
    there = (row < rows)[:, None] & (channel < half)[None, :]
    x_at = halves_at(X, row, heads, tokens, x_batch, x_token, x_head) + channel[None, :]
    a = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x_at + half, mask=there, other=0.0).to(tl.float32)
    cos = tl.load(halves_at(COS, row, heads, tokens, table_batch, table_token, 0) + channel[None, :], mask=there)
    sin = tl.load(halves_at(SIN, row, heads, tokens, table_batch, table_token, 0) + half + channel[None, :], mask=there)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32) * sign
    if NORM:
        square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
        inverse = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
        a = a * inverse * tl.load(W + channel, mask=channel < half, other=0.0).to(tl.float32)[None, :]
        b = b * inverse * tl.load(W + half + channel, mask=channel < half, other=0.0).to(tl.float32)[None, :]
    y_at = Y + row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(y_at, (a * cos - b * sin).to(Y.dtype.element_ty), mask=there)
    tl.store(y_at + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=there)


@jit
def _forward_kernel(
    Q, K, QY, KY, COS, SIN, QW, KW, all_tokens, tokens, q_heads, k_heads, width, eps, sign, q_blocks,
    q_batch, q_token, q_head, k_batch, k_token, k_head, table_batch, table_token,
    NORM: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):
    """The first q_blocks programs have the queries' heads, the others the keys'."""
    block = tl.program_id(0)
    if block < q_blocks:
        _turn_rows(
            Q, QY, COS, SIN, QW, block, all_tokens * q_heads, q_heads, tokens, width, eps, sign,
            q_batch, q_token, q_head, table_batch, table_token, NORM, ROWS, HALF)
    else:
        _turn_rows(
            K, KY, COS, SIN, KW, block - q_blocks, all_tokens * k_heads, k_heads, tokens, width, eps, sign,
            k_batch, k_token, k_head, table_batch, table_token, NORM, ROWS, HALF)
# fmt: on


@torch.library.custom_op("minka::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turned(q, k, cos, sin)


@torch.library.custom_op("minka::rope_backward", mutates_args=())
def _rope_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turned(d_q, d_k, cos, sin, sign=-1.0)


def turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0, norms: Any = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """New queries [B, T, H, C] and keys [B, T, K, C], rotated; by sign -1 back. norms: weights of their RMS norms."""
    (q, k), (cos, sin) = (inner_contiguous(x) for x in (q, k)), alike(cos, sin)
    batch, tokens, q_heads, width = q.shape
    y, z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows, half = head_tile(width, TILE)
    q_blocks, k_blocks = (-(-batch * tokens * x.shape[2] // rows) for x in (q, k))
    q_weight, k_weight = (w.contiguous() for w in norms or (cos, cos))  # not read without norms
    if batch * tokens:
        _forward_kernel[(q_blocks + k_blocks,)](
            q, k, y, z, cos, sin, q_weight, k_weight, batch * tokens, tokens, q_heads, k.shape[2], width, eps, sign,
            q_blocks, *q.stride()[:3], *k.stride()[:3], *table_steps(cos),
            NORM=norms is not None, ROWS=rows, HALF=half, num_warps=4,
        )  # fmt: skip
    return y, z


def alike(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The two tables with the same strides, 1 between channels."""
    if cos.stride() != sin.stride() or inner_contiguous(cos) is not cos:
        return cos.contiguous(), sin.contiguous()
    return cos, sin


def head_tile(width: int, tile: int) -> tuple[int, int]:
    """Heads that a program holds at once, and the padded half of their width."""
    half = power_of_two(width // 2)
    return max(1, tile // (2 * half)), half


def table_steps(table: Tensor) -> tuple[int, int]:
    """Strides of batch and token; a table of one row serves every row."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Empty contiguous tensors of the same shapes and dtypes."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return like(q, k)


@_rope_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return like(d_q, d_k)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _turn_back(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *torch.ops.minka.rope_backward(d_q, d_k, *ctx.saved_tensors), None, None


torch.library.register_autograd("minka::rope", _turn_back, setup_context=_save_tables)
