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


# By channels: blocks that spill no register. AMPERE's fit into the 99 KiB of GeForce, L40S and RTX PRO as well.
HOPPER = {64: Launch(128, 64, 8, 3), 128: Launch(128, 128, 8, 3), 256: Launch(128, 64, 8, 2)}
AMPERE = {64: Launch(128, 64, 4, 3), 128: Launch(128, 64, 8, 2), 256: Launch(64, 32, 8, 2)}
FP32 = {64: Launch(32, 32, 4, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 32, 8, 1)}


def forward_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """For heads of `width` channels in numbers of `bytes_each`, on a GPU of the given compute capability."""
    return pick(width, FP32 if bytes_each > 2 else HOPPER if large(compute) else AMPERE)


def large(compute: tuple[int, int]) -> bool:
    """Whether a block may have 227 KiB of shared memory: Hopper and the Blackwell of data centres."""
    return (9, 0) <= compute < (12, 0)


def pick(width: int, table: Mapping[int, Launch]) -> Launch:
    """The launch of the narrowest heads in the table that are not narrower than `width`."""
    return table[min(channels for channels in table if channels >= width)]


def padded(width: int) -> int:
    """Channels of a block: products take at least 16, and powers of two."""
    return max(16, power_of_two(width))


# fmt: off
@jit
def load_rows(X, first, rows, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from row `first` on: 0 beyond WIDTH, and rows beyond the end are the last one again."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    last = (tl.minimum(rows - 1 - first, ROWS - 1).to(tl.int64) * step).to(tl.int32)
    at = X + tl.cast(first, tl.int64) * step + (tl.minimum(row * step, last)[:, None] + column[None, :])
    if WIDTH < COLUMNS:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@jit
def store_rows(X, x, first, rows, step, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The reverse, rounded to X's dtype."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = X + tl.cast(first, tl.int64) * step + ((row * step)[:, None] + column[None, :])
    there = (row < rows - first)[:, None] & (column < WIDTH)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=there)


@jit
def forward_kernel(
    Q, K, V, Y, LSE, FIRST, END, queries, keys, groups, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, y_token, y_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):
    """QUERIES queries of a head. Programs begin with the last queries, which see most."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1).to(tl.int64)
    row = block + tl.arange(0, QUERIES)
    real = tl.minimum(row, queries - 1)  # rows beyond the end see what the last one sees
    first_key, end_key = tl.load(FIRST + real), tl.load(END + real)
    all_from, all_to = tl.max(first_key), tl.min(end_key)  # every query sees these keys
    K += head // groups * k_head
    V += head // groups * v_head
    q = load_rows(Q + head * q_head, block, queries, q_token, QUERIES, WIDTH, COLUMNS)
    exponent = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 for exp
    y = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    peak = tl.full((QUERIES,), -1e30, dtype=tl.float32)  # finite: a row may have seen no key yet
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    for first in range(tl.min(first_key), tl.max(end_key), KEYS):
        k = load_rows(K, first, keys, k_token, KEYS, WIDTH, COLUMNS)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if (first < all_from) | (first + KEYS > all_to):
            key = first + tl.arange(0, KEYS)
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1) * exponent)
        weights = tl.exp2(logits * exponent - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = load_rows(V, first, keys, v_token, KEYS, WIDTH, COLUMNS)
        y = tl.dot(weights.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        peak = higher
    y = y / tl.where(total > 0.0, total, 1.0)[:, None]
    store_rows(Y + head * y_head, y, block, queries, y_token, QUERIES, WIDTH, COLUMNS)
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
            q, k, v, y, log_sums, first_key, end_key, queries, keys, heads // k.shape[1], scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *y.stride()[:2],
            QUERIES=launch.queries, KEYS=launch.keys, WIDTH=width, COLUMNS=columns,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return y, log_sums
