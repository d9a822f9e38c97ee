"""The backward kernels of flash_attention.py."""

import torch
from torch import Tensor

from minka.kernels.attention_spans import Spans
from minka.kernels.flash_attention_forward import Launch, large, load_rows, padded, pick, store_rows
from minka.kernels.launch import capability
from minka.kernels.optional_triton import jit, tl

DELTA_ROWS = 64

# As in flash_attention_forward.py. KEYS: a block of keys stays, and blocks of queries pass by; QUERIES: the reverse.
HOPPER_KEYS = {
    64: Launch(64, 128, 8, 3), 96: Launch(64, 128, 8, 2), 128: Launch(64, 128, 8, 3), 256: Launch(64, 32, 8, 2)
}  # fmt: skip
AMPERE_KEYS = {64: Launch(32, 128, 8, 3), 128: Launch(64, 64, 8, 2), 256: Launch(32, 32, 8, 2)}
FP32_KEYS = {64: Launch(16, 32, 4, 1), 128: Launch(16, 32, 8, 1), 256: Launch(16, 16, 8, 1)}
HOPPER_QUERIES = {64: Launch(128, 128, 8, 3), 128: Launch(128, 64, 8, 3), 256: Launch(128, 32, 8, 2)}
AMPERE_QUERIES = {128: Launch(64, 64, 4, 2), 256: Launch(64, 32, 8, 1)}
FP32_QUERIES = {64: Launch(32, 16, 4, 1), 128: Launch(32, 16, 8, 1), 256: Launch(16, 16, 8, 1)}


def keys_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """Of the kernel for the gradients of keys and values."""
    return pick(width, FP32_KEYS if bytes_each > 2 else HOPPER_KEYS if large(compute) else AMPERE_KEYS)


def queries_launch(width: int, bytes_each: int, compute: tuple[int, int]) -> Launch:
    """Of the kernel for the gradients of queries."""
    return pick(width, FP32_QUERIES if bytes_each > 2 else HOPPER_QUERIES if large(compute) else AMPERE_QUERIES)


# fmt: off
@jit
def delta_kernel(
    DY, Y, DELTA, queries, dy_token, dy_head, y_token, y_head,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Each row's product of y and its gradient: how far all of its weights' gradients are from 0 on average."""
    block, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    y = load_rows(Y + head * y_head, block, queries, y_token, ROWS, WIDTH, COLUMNS).to(tl.float32)
    d_y = load_rows(DY + head * dy_head, block, queries, dy_token, ROWS, WIDTH, COLUMNS).to(tl.float32)
    row = block + tl.arange(0, ROWS)
    tl.store(DELTA + head * queries + row, tl.sum(y * d_y, axis=1), mask=row < queries)


@jit
def keys_kernel(
    Q, K, V, DY, LSE, DELTA, FIRST, END, DK, DV, queries, keys, groups, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, dy_token, dy_head, dk_token, dk_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Gradients of KEYS keys and values of a head, from all query heads of its group."""
    group, block = tl.program_id(1).to(tl.int64), tl.program_id(0) * KEYS
    real = tl.minimum(block + tl.arange(0, KEYS), keys - 1)
    first_query, end_query = tl.load(FIRST + real), tl.load(END + real)
    begin, end = tl.min(first_query), tl.max(end_query)
    all_from, all_to = tl.max(first_query), tl.min(end_query)  # these queries see every key
    k = load_rows(K + group * k_head, block, keys, k_token, KEYS, WIDTH, COLUMNS)
    v = load_rows(V + group * v_head, block, keys, v_token, KEYS, WIDTH, COLUMNS)
    d_k = tl.zeros((KEYS, COLUMNS), dtype=tl.float32)
    d_v = tl.zeros((KEYS, COLUMNS), dtype=tl.float32)
    exponent = tl.cast(scale, tl.float32) * 1.4426950408889634
    head, first = group * groups, begin
    for _ in range(groups * tl.cdiv(end - begin, QUERIES)):  # one loop: nested ones would spill registers
        row = tl.minimum(first + tl.arange(0, QUERIES), queries - 1)
        q = load_rows(Q + head * q_head, first, queries, q_token, QUERIES, WIDTH, COLUMNS)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee")  # [keys, queries]
        log_sum = tl.load(LSE + head * queries + row) * 1.4426950408889634
        weights = tl.exp2(logits * exponent - log_sum[None, :])
        if (first < all_from) | (first + QUERIES > all_to):
            query = first + tl.arange(0, QUERIES)
            low, high = tl.load(FIRST + real)[:, None], tl.load(END + real)[:, None]
            weights = tl.where((query[None, :] >= low) & (query[None, :] < high), weights, 0.0)
        d_y = load_rows(DY + head * dy_head, first, queries, dy_token, QUERIES, WIDTH, COLUMNS)
        d_v = tl.dot(weights.to(d_y.dtype), d_y, d_v, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(d_y), input_precision="ieee")
        delta = tl.load(DELTA + head * queries + row)
        d_logits = weights * (d_weights - delta[None, :])
        d_k = tl.dot(d_logits.to(q.dtype), q, d_k, input_precision="ieee")
        first += QUERIES
        head += (first >= end).to(tl.int64)
        first = tl.where(first >= end, begin, first)
    d_k = d_k * tl.cast(scale, tl.float32)
    store_rows(DK + group * dk_head, d_k, block, keys, dk_token, KEYS, WIDTH, COLUMNS)
    store_rows(DV + group * dk_head, d_v, block, keys, dk_token, KEYS, WIDTH, COLUMNS)


@jit
def queries_kernel(
    Q, K, V, DY, LSE, DELTA, FIRST, END, DQ, queries, keys, groups, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, dy_token, dy_head, dq_token, dq_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Gradients of QUERIES queries of a head. Programs begin with the last queries, which see most."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1).to(tl.int64)
    real = tl.minimum(block + tl.arange(0, QUERIES), queries - 1)
    first_key, end_key = tl.load(FIRST + real), tl.load(END + real)
    all_from, all_to = tl.max(first_key), tl.min(end_key)
    log_sum = tl.load(LSE + head * queries + real) * 1.4426950408889634
    delta = tl.load(DELTA + head * queries + real)
    q = load_rows(Q + head * q_head, block, queries, q_token, QUERIES, WIDTH, COLUMNS)
    d_y = load_rows(DY + head * dy_head, block, queries, dy_token, QUERIES, WIDTH, COLUMNS)
    K += head // groups * k_head
    V += head // groups * v_head
    exponent = tl.cast(scale, tl.float32) * 1.4426950408889634
    d_q = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    for first in range(tl.min(first_key), tl.max(end_key), KEYS):
        k = load_rows(K, first, keys, k_token, KEYS, WIDTH, COLUMNS)
        v = load_rows(V, first, keys, v_token, KEYS, WIDTH, COLUMNS)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights = tl.exp2(logits * exponent - log_sum[:, None])
        if (first < all_from) | (first + KEYS > all_to):
            key = first + tl.arange(0, KEYS)
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(d_y, tl.trans(v), input_precision="ieee")
        d_logits = weights * (d_weights - delta[:, None])
        d_q = tl.dot(d_logits.to(k.dtype), k, d_q, input_precision="ieee")
    d_q = d_q * tl.cast(scale, tl.float32)
    store_rows(DQ + head * dq_head, d_q, block, queries, dq_token, QUERIES, WIDTH, COLUMNS)
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
        d_y, y, delta, queries, *d_y.stride()[:2], *y.stride()[:2], ROWS=DELTA_ROWS, WIDTH=width, COLUMNS=columns
    )
    given = (
        queries, keys, heads // groups_, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *d_y.stride()[:2],
    )  # fmt: skip
    size, device = q.element_size(), capability(q.device)
    launch = keys_launch(width, size, device)
    keys_kernel[-(-keys // launch.keys), groups_](
        q, k, v, d_y, log_sums, delta, spans.first_query, spans.end_query, d_k, d_v, *given, *d_k.stride()[:2],
        QUERIES=launch.queries, KEYS=launch.keys, WIDTH=width, COLUMNS=columns,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    launch = queries_launch(width, size, device)
    queries_kernel[-(-queries // launch.queries), heads](
        q, k, v, d_y, log_sums, delta, spans.first_key, spans.end_key, d_q, *given, *d_q.stride()[:2],
        QUERIES=launch.queries, KEYS=launch.keys, WIDTH=width, COLUMNS=columns,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return d_q, d_k, d_v
