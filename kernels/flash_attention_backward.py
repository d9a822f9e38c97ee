"""The backward kernels of flash_attention.py."""

import torch
from torch import Tensor

from minka.kernels.attention_spans import Spans
from minka.kernels.flash_attention_forward import Launch, bounds, load_rows, padded, pick
from minka.kernels.launch import capability
from minka.kernels.optional_triton import jit, tl

DELTA_ROWS = 64


# As in flash_attention_forward.py. KEYS: a block of keys stays, and blocks of queries pass by; QUERIES: the reverse.
HOPPER_KEYS = {96: Launch(64, 128, 8, 2), 128: Launch(32, 128, 8, 2), 256: Launch(32, 32, 8, 1)}
AMPERE_KEYS = {
    64: Launch(32, 128, 8, 2), 96: Launch(32, 64, 8, 1), 128: Launch(64, 64, 8, 2), 256: Launch(32, 32, 8, 1)
}  # fmt: skip
FP32_KEYS = {64: Launch(16, 32, 4, 1), 256: Launch(16, 16, 8, 1)}
HOPPER_QUERIES = {128: Launch(128, 64, 8, 2), 256: Launch(64, 32, 8, 2)}
AMPERE_QUERIES = {64: Launch(64, 64, 4, 2), 256: Launch(64, 64, 8, 2)}
FP32_QUERIES = {64: Launch(32, 16, 4, 1), 128: Launch(32, 16, 8, 1), 256: Launch(16, 16, 8, 1)}


def keys_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """Of the kernel for the gradients of keys and values."""
    return pick(FP32_KEYS if bytes_each > 2 else HOPPER_KEYS if compute >= (9, 0) else AMPERE_KEYS, width)


def queries_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """Of the kernel for the gradients of queries."""
    return pick(FP32_QUERIES if bytes_each > 2 else HOPPER_QUERIES if compute >= (9, 0) else AMPERE_QUERIES, width)


# fmt: off
@jit
def delta_kernel(
    DY, Y, DELTA, queries, width, dy_token, dy_head, y_token, y_head, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Each row's product of y and its gradient: how far all of its weights' gradients are from 0 on average."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = load_rows(Y + head * y_head, row, queries, y_token, width, True, COLUMNS, False).to(tl.float32)
    d_y = load_rows(DY + head * dy_head, row, queries, dy_token, width, True, COLUMNS, False).to(tl.float32)
    tl.store(DELTA + head * queries + row, tl.sum(y * d_y, axis=1), mask=row < queries)


@jit
def keys_kernel(
    Q, K, V, DY, LSE, DELTA, FIRST, END, DK, DV, queries, keys, groups, width, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, dy_token, dy_head, dk_token, dk_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):
    """Gradients of KEYS keys and values of a head, from all query heads of its group."""
    group = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    real = tl.minimum(key, keys - 1)
    first_query, end_query = tl.load(FIRST + real), tl.load(END + real)
    k = load_rows(K + group * k_head, real, keys, k_token, width, False, COLUMNS, FULL)
    v = load_rows(V + group * v_head, real, keys, v_token, width, False, COLUMNS, FULL)
    begin, end = tl.min(first_query) // QUERIES * QUERIES, tl.max(end_query)
    d_k = tl.zeros((KEYS, COLUMNS), dtype=tl.float32)
    d_v = tl.zeros((KEYS, COLUMNS), dtype=tl.float32)
    exponent = tl.cast(scale, tl.float32) * 1.4426950408889634
    for head in range(group * groups, group * groups + groups):
        for first in range(begin, end, QUERIES):
            row = first + tl.arange(0, QUERIES)
            # Masked in every block: a second loop without a mask costs more registers than there are.
            seen = (row[None, :] >= first_query[:, None]) & (row[None, :] < end_query[:, None])
            row = tl.minimum(row, queries - 1)
            q = load_rows(Q + head * q_head, row, queries, q_token, width, False, COLUMNS, FULL)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * exponent  # [keys, queries]
            log_sum = tl.load(LSE + head * queries + row) * 1.4426950408889634
            weights = tl.where(seen, tl.exp2(logits - log_sum[None, :]), 0.0)
            d_y = load_rows(DY + head * dy_head, row, queries, dy_token, width, False, COLUMNS, FULL)
            d_v = tl.dot(weights.to(d_y.dtype), d_y, d_v, input_precision="ieee")
            d_weights = tl.dot(v, tl.trans(d_y), input_precision="ieee")
            d_logits = weights * (d_weights - tl.load(DELTA + head * queries + row)[None, :])
            d_k = tl.dot(d_logits.to(q.dtype), q, d_k, input_precision="ieee")
    column = tl.arange(0, COLUMNS)
    there = (key < keys)[:, None] & (column < width)[None, :]
    at = group * dk_head + key.to(tl.int64)[:, None] * dk_token + column[None, :]
    tl.store(DK + at, (d_k * tl.cast(scale, tl.float32)).to(DK.dtype.element_ty), mask=there)
    tl.store(DV + at, d_v.to(DV.dtype.element_ty), mask=there)


@jit
def _add_keys(
    d_q, q, d_y, log_sum, delta, K, V, begin, skip, skip_end, end, keys, k_step, v_step, width, scale, first_key,
    end_key, MASK: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):
    """Add what the keys [begin, end) but for [skip, skip_end) give to the gradients of a block of queries."""
    for turn in range(begin, end - (skip_end - skip), KEYS):
        key = turn + tl.arange(0, KEYS)
        if MASK:
            key += tl.where(turn < skip, 0, skip_end - skip)
        k = load_rows(K, key, keys, k_step, width, MASK, COLUMNS, FULL)
        v = load_rows(V, key, keys, v_step, width, MASK, COLUMNS, FULL)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.exp2(logits - log_sum[:, None])
        if MASK:
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(d_y, tl.trans(v), input_precision="ieee")
        d_logits = weights * (d_weights - delta[:, None])
        d_q = tl.dot(d_logits.to(k.dtype), k, d_q, input_precision="ieee")
    return d_q


@jit
def queries_kernel(
    Q, K, V, DY, LSE, DELTA, FIRST, END, DQ, queries, keys, groups, width, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, dy_token, dy_head, dq_token, dq_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):
    """Gradients of QUERIES queries of a head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    real = tl.minimum(row, queries - 1)
    first_key, end_key = tl.load(FIRST + real), tl.load(END + real)
    q = load_rows(Q + head * q_head, real, queries, q_token, width, False, COLUMNS, FULL)
    d_y = load_rows(DY + head * dy_head, real, queries, dy_token, width, False, COLUMNS, FULL)
    log_sum = tl.load(LSE + head * queries + real) * 1.4426950408889634
    delta = tl.load(DELTA + head * queries + real)
    K += head // groups * k_head
    V += head // groups * v_head
    a, b, c, d = bounds(tl.min(first_key), tl.max(first_key), tl.min(end_key), tl.max(end_key), KEYS)
    exponent = tl.cast(scale, tl.float32) * 1.4426950408889634
    d_q = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    d_q = _add_keys(
        d_q, q, d_y, log_sum, delta, K, V, b, c, c, c, keys, k_token, v_token, width, exponent, first_key, end_key,
        False, KEYS, COLUMNS, FULL)
    d_q = _add_keys(
        d_q, q, d_y, log_sum, delta, K, V, a, b, c, d, keys, k_token, v_token, width, exponent, first_key, end_key,
        True, KEYS, COLUMNS, FULL)
    column = tl.arange(0, COLUMNS)
    there = (row < queries)[:, None] & (column < width)[None, :]
    at = DQ + head * dq_head + row.to(tl.int64)[:, None] * dq_token + column[None, :]
    tl.store(at, (d_q * tl.cast(scale, tl.float32)).to(DQ.dtype.element_ty), mask=there)
# fmt: on


def backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes."""
    (queries, heads, width), (keys, groups_, _) = q.shape, k.shape
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not queries or not keys:
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    delta, columns = torch.empty_like(log_sums), padded(width)
    delta_kernel[-(-queries // DELTA_ROWS), heads](
        d_y, y, delta, queries, width, *d_y.stride()[:2], *y.stride()[:2], ROWS=DELTA_ROWS, COLUMNS=columns
    )
    given = (
        queries, keys, heads // groups_, width, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *d_y.stride()[:2],
    )  # fmt: skip
    size, device = q.element_size(), capability(q.device)
    launch = keys_launch(width, size, device)
    keys_kernel[-(-keys // launch.keys), groups_](
        q, k, v, d_y, log_sums, delta, spans.first_query, spans.end_query, d_k, d_v, *given, *d_k.stride()[:2],
        QUERIES=launch.queries, KEYS=launch.keys, COLUMNS=columns, FULL=columns == width,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    launch = queries_launch(width, size, device)
    queries_kernel[-(-queries // launch.queries), heads](
        q, k, v, d_y, log_sums, delta, spans.first_key, spans.end_key, d_q, *given, *d_q.stride()[:2],
        QUERIES=launch.queries, KEYS=launch.keys, COLUMNS=columns, FULL=columns == width,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return d_q, d_k, d_v
