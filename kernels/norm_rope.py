"""A norm of each query and key head (QK-norm, as in Qwen 3), then their rotation (rope.py), in one pass.

B batch · T tokens · H query heads · K key heads · C head width; tables as in rope.py

Half-precision inputs are computed in fp32 and rounded once, at the end; "torch" rounds after the norm as well.
"""

from typing import Any

import torch
from torch import Tensor

from minka.kernels.launch import inner_contiguous, processors
from minka.kernels.optional_triton import jit, tl
from minka.kernels.rms_norm import rms_norm
from minka.kernels.rope import How, alike, halves_at, head_tile, like, rope, table_steps, turned

BACKWARD_TILE = 1024  # elements of heads that a program holds at once
BACKWARD_WARPS = 8


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, how: How = "torch"
) -> tuple[Tensor, Tensor]:
    """rope of rms_norm over C with weights [C], of q [B, T, H, C] and k [B, T, K, C]."""
    if how == "triton":
        return torch.ops.minka.norm_rope(q, k, q_weight, k_weight, eps, cos, sin)
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


# fmt: off
@jit
def _turn_rows_back(
    X, DY, DX, DW, COS, SIN, W, program, programs, turns, rows, heads, tokens, width, eps,
    x_batch, x_token, x_head, dy_batch, dy_token, dy_head, table_batch, table_token,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):
    """Gradients of every programs-th ROWS heads through rotation and norm, and of the weight, summed over them."""
    channel = tl.arange(0, HALF)
    half = width // 2
    w1 = tl.load(W + channel, mask=channel < half, other=0.0).to(tl.float32)
    w2 = tl.load(W + half + channel, mask=channel < half, other=0.0).to(tl.float32)
    d1 = tl.zeros((HALF,), dtype=tl.float32)
    d2 = tl.zeros((HALF,), dtype=tl.float32)
    for turn in range(turns):
        row = (program + turn * programs) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (channel < half)[None, :]
        cos_at = halves_at(COS, row, heads, tokens, table_batch, table_token, 0) + channel[None, :]
        sin_at = halves_at(SIN, row, heads, tokens, table_batch, table_token, 0) + half + channel[None, :]
        cos = tl.load(cos_at, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_at, mask=there, other=0.0).to(tl.float32)
        dy_at = halves_at(DY, row, heads, tokens, dy_batch, dy_token, dy_head) + channel[None, :]
        u = tl.load(dy_at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(dy_at + half, mask=there, other=0.0).to(tl.float32)
        du, dv = u * cos + v * sin, v * cos - u * sin
        x_at = halves_at(X, row, heads, tokens, x_batch, x_token, x_head) + channel[None, :]
        a = tl.load(x_at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(x_at + half, mask=there, other=0.0).to(tl.float32)
        square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / width
        inverse = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
        a, b = a * inverse, b * inverse
        d1 += tl.sum(du * a, axis=0)
        d2 += tl.sum(dv * b, axis=0)
        du, dv = du * w1[None, :], dv * w2[None, :]
        along = ((tl.sum(du * a, axis=1) + tl.sum(dv * b, axis=1)) / width)[:, None]
        dx_at = DX + row.to(tl.int64)[:, None] * width + channel[None, :]
        tl.store(dx_at, ((du - a * along) * inverse).to(DX.dtype.element_ty), mask=there)
        tl.store(dx_at + half, ((dv - b * along) * inverse).to(DX.dtype.element_ty), mask=there)
    sums = DW + program.to(tl.int64) * width + channel
    tl.store(sums, d1, mask=channel < half)
    tl.store(sums + half, d2, mask=channel < half)


@jit
def _backward_kernel(
    Q, K, DQY, DKY, DQ, DK, DQW, DKW, COS, SIN, QW, KW, all_tokens, tokens, q_heads, k_heads, width, eps,
    q_programs, k_programs, q_turns, k_turns, q_batch, q_token, q_head, k_batch, k_token, k_head,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, table_batch, table_token,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):
    """The first q_programs programs share the queries' heads, the others the keys'."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn_rows_back(
            Q, DQY, DQ, DQW, COS, SIN, QW, program, q_programs, q_turns, all_tokens * q_heads, q_heads, tokens, width,
            eps, q_batch, q_token, q_head, dq_batch, dq_token, dq_head, table_batch, table_token, ROWS, HALF)
    else:
        _turn_rows_back(
            K, DKY, DK, DKW, COS, SIN, KW, program - q_programs, k_programs, k_turns, all_tokens * k_heads,
            k_heads, tokens, width, eps, k_batch, k_token, k_head, dk_batch, dk_token, dk_head, table_batch,
            table_token, ROWS, HALF)
# fmt: on


@torch.library.custom_op("minka::norm_rope", mutates_args=())
def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return turned(q, k, cos, sin, norms=(q_weight, k_weight), eps=eps)


@torch.library.custom_op("minka::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    d_q: Tensor, d_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and the two weights."""
    (q, k, d_q, d_k), (cos, sin) = (inner_contiguous(x) for x in (q, k, d_q, d_k)), alike(cos, sin)
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    batch, tokens, q_heads, width = q.shape
    d_x, d_z = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows, half = head_tile(width, BACKWARD_TILE)
    (q_programs, q_turns), (k_programs, k_turns) = (
        _shares(-(-batch * tokens * x.shape[2] // rows), q.device) for x in (q, k)
    )
    q_sums, k_sums = (torch.empty(n, width, dtype=torch.float32, device=q.device) for n in (q_programs, k_programs))
    _backward_kernel[(q_programs + k_programs,)](
        q, k, d_q, d_k, d_x, d_z, q_sums, k_sums, cos, sin, q_weight, k_weight, batch * tokens, tokens, q_heads,
        k.shape[2], width, eps, q_programs, k_programs, q_turns, k_turns, *q.stride()[:3], *k.stride()[:3],
        *d_q.stride()[:3], *d_k.stride()[:3], *table_steps(cos), ROWS=rows, HALF=half, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return d_x, d_z, q_sums.sum(dim=0).to(q_weight.dtype), k_sums.sum(dim=0).to(k_weight.dtype)


def _shares(blocks: int, device: torch.device) -> tuple[int, int]:
    """Programs that share the blocks, and how many each has."""
    programs = max(1, min(2 * processors(device), blocks))
    return programs, -(-blocks // programs)


@_norm_rope.register_fake
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    return like(q, k)


@_norm_rope_backward.register_fake
def _(
    d_q: Tensor, d_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return like(q, k, q_weight, k_weight)


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, cos, sin = inputs
    ctx.save_for_backward(*tensors, cos, sin)


def _norm_back(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cos, sin = ctx.saved_tensors
    return *torch.ops.minka.norm_rope_backward(d_q, d_k, *tensors, ctx.eps, cos, sin), None, None, None


torch.library.register_autograd("minka::norm_rope", _norm_back, setup_context=_save_all)
