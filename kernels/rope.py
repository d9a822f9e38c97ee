"""Rotation of query and key channels together, the heart of RoPE (Su et al. 2021), after a norm of each head or not.

B batch · T tokens · H query heads · K key heads · C head width, channels in the half-split order

The tables are cos [B, T, 1, C] and sin [B, T, 1, C] of every token's position, in fp32; sin carries the signs of a
rotation: minus in its first half, plus in its second. Half-precision inputs are computed in fp32 and rounded once, at
the end; "torch" with a norm rounds after the norm as well. Backward is the opposite rotation, and saves no activation
without a norm.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minka.kernels.accumulation_dtype import wide
from minka.kernels.launch import inner_contiguous, processors
from minka.kernels.optional_triton import jit, power_of_two, tl
from minka.kernels.rms_norm import rms_norm

How = Literal["torch", "triton"]
TILE, BACKWARD_TILE = 2048, 1024  # elements of heads that a program holds at once
BACKWARD_WARPS = 8


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, how: How = "torch") -> tuple[Tensor, Tensor]:
    """x * cos + swap(x) * sin of q [B, T, H, C] and k [B, T, K, C]; swap exchanges the halves of the channels."""
    if how == "triton":
        return torch.ops.minka.rope(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, how: How = "torch"
) -> tuple[Tensor, Tensor]:
    """The same of heads that are normalised first, as Qwen 3 does: rms_norm over C with weights [C]."""
    if how == "triton":
        return torch.ops.minka.norm_rope(q, k, q_weight, k_weight, eps, cos, sin)
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


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
def _turn_heads(
    X, Y, x_head, y_head, heads, cos, sin, W1, W2, width, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):
    """All heads of one token: the norm, then the rotation."""
    channel = tl.arange(0, HALF)
    half = width // 2
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        there = (head < heads)[:, None] & (channel < half)[None, :]
        x_at = X + head[:, None].to(tl.int64) * x_head + channel[None, :]
        y_at = Y + head[:, None].to(tl.int64) * y_head + channel[None, :]
        a = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(x_at + half, mask=there, other=0.0).to(tl.float32)
        if NORM:
            square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
            inverse = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
            a = a * inverse * W1[None, :]
            b = b * inverse * W2[None, :]
        tl.store(y_at, (a * cos - b * sin).to(Y.dtype.element_ty), mask=there)
        tl.store(y_at + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=there)


@jit
def _forward_kernel(
    Q, K, QY, KY, COS, SIN, QW, KW, tokens, q_heads, k_heads, width, eps, sign,
    q_batch, q_token, q_head, k_batch, k_token, k_head, table_batch, table_token,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // tokens, token % tokens
    channel = tl.arange(0, HALF)
    half = width // 2
    there = channel < half
    table = batch * table_batch + place * table_token + channel
    cos = tl.load(COS + table, mask=there, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + table + half, mask=there, other=0.0).to(tl.float32)[None, :] * sign
    q1, q2, k1, k2 = cos, cos, cos, cos
    if NORM:
        q1 = tl.load(QW + channel, mask=there, other=0.0).to(tl.float32)
        q2 = tl.load(QW + half + channel, mask=there, other=0.0).to(tl.float32)
        k1 = tl.load(KW + channel, mask=there, other=0.0).to(tl.float32)
        k2 = tl.load(KW + half + channel, mask=there, other=0.0).to(tl.float32)
    q_at, k_at = batch * q_batch + place * q_token, batch * k_batch + place * k_token
    _turn_heads(
        Q + q_at, QY + token * q_heads * width, q_head, width, q_heads, cos, sin, q1, q2, width, eps,
        NORM, HEADS, HALF)
    _turn_heads(
        K + k_at, KY + token * k_heads * width, k_head, width, k_heads, cos, sin, k1, k2, width, eps,
        NORM, HEADS, HALF)


@jit
def _norm_back_heads(
    X, DY, DX, x_head, dy_head, heads, cos, sin, W1, W2, D1, D2, width, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):
    """Gradients of all heads of one token through rotation and norm; returns what the weight's halves have summed."""
    channel = tl.arange(0, HALF)
    half = width // 2
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        there = (head < heads)[:, None] & (channel < half)[None, :]
        x_at = X + head[:, None].to(tl.int64) * x_head + channel[None, :]
        dy_at = DY + head[:, None].to(tl.int64) * dy_head + channel[None, :]
        dx_at = DX + head[:, None].to(tl.int64) * width + channel[None, :]
        a = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(x_at + half, mask=there, other=0.0).to(tl.float32)
        u = tl.load(dy_at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(dy_at + half, mask=there, other=0.0).to(tl.float32)
        du, dv = u * cos + v * sin, v * cos - u * sin
        square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
        inverse = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
        a, b = a * inverse, b * inverse
        D1 += tl.sum(du * a, axis=0)
        D2 += tl.sum(dv * b, axis=0)
        du, dv = du * W1[None, :], dv * W2[None, :]
        along = ((tl.sum(du * a, axis=1) + tl.sum(dv * b, axis=1)) / width)[:, None]
        tl.store(dx_at, ((du - a * along) * inverse).to(DX.dtype.element_ty), mask=there)
        tl.store(dx_at + half, ((dv - b * along) * inverse).to(DX.dtype.element_ty), mask=there)
    return D1, D2


@jit
def _norm_backward_kernel(
    Q, K, DQY, DKY, DQ, DK, COS, SIN, QW, KW, DW, all_tokens, tokens, q_heads, k_heads, width, eps, turns,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, table_batch, table_token,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF)
    half = width // 2
    there = channel < half
    q1 = tl.load(QW + channel, mask=there, other=0.0).to(tl.float32)
    q2 = tl.load(QW + half + channel, mask=there, other=0.0).to(tl.float32)
    k1 = tl.load(KW + channel, mask=there, other=0.0).to(tl.float32)
    k2 = tl.load(KW + half + channel, mask=there, other=0.0).to(tl.float32)
    dq1 = tl.zeros((HALF,), dtype=tl.float32)
    dq2 = tl.zeros((HALF,), dtype=tl.float32)
    dk1 = tl.zeros((HALF,), dtype=tl.float32)
    dk2 = tl.zeros((HALF,), dtype=tl.float32)
    for token in range(program * turns, tl.minimum(program * turns + turns, all_tokens)):
        batch, place = token // tokens, token % tokens
        table = batch * table_batch + place * table_token + channel
        cos = tl.load(COS + table, mask=there, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(SIN + table + half, mask=there, other=0.0).to(tl.float32)[None, :]
        dq1, dq2 = _norm_back_heads(
            Q + batch * q_batch + place * q_token, DQY + batch * dq_batch + place * dq_token,
            DQ + token * q_heads * width, q_head, dq_head, q_heads, cos, sin, q1, q2, dq1, dq2, width, eps,
            HEADS, HALF)
        dk1, dk2 = _norm_back_heads(
            K + batch * k_batch + place * k_token, DKY + batch * dk_batch + place * dk_token,
            DK + token * k_heads * width, k_head, dk_head, k_heads, cos, sin, k1, k2, dk1, dk2, width, eps,
            HEADS, HALF)
    sums = DW + program * 2 * width + channel
    tl.store(sums, dq1, mask=there)
    tl.store(sums + half, dq2, mask=there)
    tl.store(sums + width, dk1, mask=there)
    tl.store(sums + width + half, dk2, mask=there)
# fmt: on


@torch.library.custom_op("minka::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(q, k, cos, sin)


@torch.library.custom_op("minka::rope_backward", mutates_args=())
def _rope_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(d_q, d_k, cos, sin, sign=-1.0)


@torch.library.custom_op("minka::norm_rope", mutates_args=())
def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _turned(q, k, cos, sin, norms=(q_weight, k_weight), eps=eps)


@torch.library.custom_op("minka::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    d_q: Tensor, d_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and the two weights."""
    q, k, d_q, d_k, cos, sin = (inner_contiguous(x) for x in (q, k, d_q, d_k, cos, sin))
    batch, tokens, q_heads, width = q.shape
    d_x, d_z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    programs = max(1, min(processors(q.device) * 4, batch * tokens))
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=q.device)
    heads, half = head_tile(max(q_heads, k.shape[2]), width, BACKWARD_TILE)
    _norm_backward_kernel[(programs,)](
        q, k, d_q, d_k, d_x, d_z, cos, sin, q_weight, k_weight, sums, batch * tokens, tokens, q_heads, k.shape[2],
        width, eps, -(-batch * tokens // programs), *q.stride()[:3], *k.stride()[:3], *d_q.stride()[:3],
        *d_k.stride()[:3], *_table_steps(cos), HEADS=heads, HALF=half, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return d_x, d_z, sums[:, 0].sum(dim=0).to(q_weight.dtype), sums[:, 1].sum(dim=0).to(k_weight.dtype)


def _turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0, norms: Any = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (inner_contiguous(x) for x in (q, k, cos, sin))
    batch, tokens, q_heads, width = q.shape
    y, z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    heads, half = head_tile(max(q_heads, k.shape[2]), width, TILE)
    q_weight, k_weight = norms or (cos, cos)  # not read without norms
    if batch * tokens:
        _forward_kernel[(batch * tokens,)](
            q, k, y, z, cos, sin, q_weight, k_weight, tokens, q_heads, k.shape[2], width, eps, sign,
            *q.stride()[:3], *k.stride()[:3], *_table_steps(cos),
            NORM=norms is not None, HEADS=heads, HALF=half, num_warps=4,
        )  # fmt: skip
    return y, z


def head_tile(heads: int, width: int, tile: int) -> tuple[int, int]:
    """Heads that a program holds at once, and the padded half of their width."""
    half = power_of_two(width // 2)
    return max(1, min(power_of_two(heads), tile // (2 * half))), half


def _table_steps(table: Tensor) -> tuple[int, int]:
    """Strides of batch and token; a table of one row serves every row."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return _like(q, k)


@_rope_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return _like(d_q, d_k)


@_norm_rope.register_fake
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    return _like(q, k)


@_norm_rope_backward.register_fake
def _(
    d_q: Tensor, d_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _like(q, k, q_weight, k_weight)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _turn_back(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *torch.ops.minka.rope_backward(d_q, d_k, *ctx.saved_tensors), None, None


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(*tensors, cos, sin)


def _norm_back(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cos, sin = ctx.saved_tensors
    return *torch.ops.minka.norm_rope_backward(d_q, d_k, *tensors, ctx.eps, cos, sin), None, None, None


torch.library.register_autograd("minka::rope", _turn_back, setup_context=_save_tables)
torch.library.register_autograd("minka::norm_rope", _norm_back, setup_context=_save_all)
