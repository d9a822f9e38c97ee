"""The forward kernel of flash_attention.py."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minka.kernels.launch import capability
from minka.kernels.optional_triton import jit, power_of_two, tl

WIDEST = 256


class Launch(NamedTuple):
    """Queries and keys of a block, warps, stages of the pipeline that loads blocks."""

    queries: int
    keys: int
    warps: int
    stages: int


# By channels (a block has the power of two above): the largest blocks that spill no register.
HOPPER = {64: Launch(128, 128, 8, 2), 128: Launch(128, 64, 8, 3), 256: Launch(128, 32, 8, 2)}
AMPERE = {64: Launch(128, 64, 8, 2), 128: Launch(128, 32, 8, 2), 256: Launch(64, 32, 8, 2)}
FP32 = {64: Launch(32, 32, 4, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 32, 8, 1)}


def forward_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """For heads of `width` channels in numbers of `bytes_each`, on a GPU of the given compute capability."""
    return pick(FP32 if bytes_each > 2 else HOPPER if compute >= (9, 0) else AMPERE, width)


def pick(table: Mapping[int, Launch], width: int) -> Launch:
    """The launch of the narrowest heads in the table that are not narrower than `width`."""
    return table[min(channels for channels in table if channels >= width)]


def padded(width: int) -> int:
    """Channels of a block: products take at least 16, and powers of two."""
    return max(16, power_of_two(width))


# fmt: off
@jit
def bounds(low, full_low, full_high, high, BLOCK: tl.constexpr):
    """(a, b, c, d), multiples of BLOCK: [a, d) holds [low, high), and in it [b, c) is within [full_low, full_high)."""
    a, d = low // BLOCK * BLOCK, tl.cdiv(high, BLOCK) * BLOCK
    b, c = tl.cdiv(full_low, BLOCK) * BLOCK, full_high // BLOCK * BLOCK
    none = c <= b
    b = tl.where(none, d, b)
    c = tl.where(none, d, c)
    return a, b, c, d


@jit
def load_rows(X, row, rows, step, width, MASK: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr):
    """[R, COLUMNS] of the rows; 0 beyond `rows` where MASK, and beyond `width` unless FULL."""
    column = tl.arange(0, COLUMNS)
    at = X + row.to(tl.int64)[:, None] * step + column[None, :]
    if MASK:
        return tl.load(at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=(column < width)[None, :], other=0.0)


@jit
def _attend(
    y, peak, total, q, K, V, begin, skip, skip_end, end, keys, k_step, v_step, width, scale, first_key, end_key,
    MASK: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):
    """Add the keys [begin, end) but for [skip, skip_end) to what the queries have attended to so far."""
    for turn in range(begin, end - (skip_end - skip), KEYS):
        key = turn + tl.arange(0, KEYS)
        if MASK:
            key += tl.where(turn < skip, 0, skip_end - skip)
        k = load_rows(K, key, keys, k_step, width, MASK, COLUMNS, FULL)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK:
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        base = higher
        if MASK:
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_rows(V, key, keys, v_step, width, MASK, COLUMNS, FULL)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        peak = higher
    return y, peak, total


@jit
def forward_kernel(
    Q, K, V, Y, LSE, FIRST, END, queries, keys, groups, width, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, y_token, y_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):
    """QUERIES queries of a head. Programs begin with the last queries, which see most."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    real = tl.minimum(row, queries - 1)  # rows beyond the end are the last one once more
    first_key, end_key = tl.load(FIRST + real), tl.load(END + real)
    q = load_rows(Q + head * q_head, real, queries, q_token, width, False, COLUMNS, FULL)
    K += head // groups * k_head
    V += head // groups * v_head
    a, b, c, d = bounds(tl.min(first_key), tl.max(first_key), tl.min(end_key), tl.max(end_key), KEYS)
    y = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    scale = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 for exp
    y, peak, total = _attend(
        y, peak, total, q, K, V, b, c, c, c, keys, k_token, v_token, width, scale, first_key, end_key,
        False, KEYS, COLUMNS, FULL)
    y, peak, total = _attend(
        y, peak, total, q, K, V, a, b, c, d, keys, k_token, v_token, width, scale, first_key, end_key,
        True, KEYS, COLUMNS, FULL)
    y = y / tl.where(total > 0.0, total, 1.0)[:, None]
    column = tl.arange(0, COLUMNS)
    there = (row < queries)[:, None] & (column < width)[None, :]
    y_at = Y + head * y_head + row.to(tl.int64)[:, None] * y_token + column[None, :]
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=there)
    log_sum = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(LSE + head * queries + row, log_sum, mask=row < queries)
# fmt: on


def forward(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [Nq, H, C] in q's dtype, and the logarithms of the sums [H, Nq] in fp32."""
    (queries, heads, width), keys = q.shape, k.shape[0]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sums = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    launch, columns = forward_launch(width, q.element_size(), capability(q.device)), padded(width)
    if queries:
        forward_kernel[-(-queries // launch.queries), heads](
            q, k, v, y, log_sums, first_key, end_key, queries, keys, heads // k.shape[1], width, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *y.stride()[:2],
            QUERIES=launch.queries, KEYS=launch.keys, COLUMNS=columns, FULL=columns == width,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return y, log_sums
