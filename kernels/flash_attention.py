"""Flash attention (Dao 2023, arXiv:2307.08691): attention that never stores its matrix of weights.

Nq queries · Nk keys, of all documents one after the other · H query heads · K key/value heads · C head width

Which query sees which key is a pair of intervals (attention_spans.py): a program skips the blocks that none of its
rows sees, and the mask in those that all see. Backward recomputes the weights from the logarithms of their sums, once
for the gradients of keys and values and once for those of queries, so that no sum has two writers.
"""

from typing import Any

import torch
from torch import Tensor

from minka.kernels.accumulation_dtype import wide
from minka.kernels.attention_spans import Spans
from minka.kernels.flash_attention_backward import backward
from minka.kernels.flash_attention_forward import WIDEST, forward
from minka.kernels.launch import inner_contiguous

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAR = 2**23  # elements from one row to the next: offsets within a block of at most 128 rows are in 32 bits


def flash_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k' * scale) v: (y [Nq, H, C], logarithms of the sums [H, Nq] in fp32); only y has a gradient.

    q [Nq, H, C], k and v [Nk, K, C], where K divides H; scale: 1 / sqrt(C) unless given. A query that sees no key has
    y = 0 and -inf. Raises ValueError for other shapes and dtypes, and for heads that are too wide.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, spans, scale)
    return torch.ops.minka.flash_attention(q, k, v, *spans, scale)


def attention_definition(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same by its formula, in fp32 or more, with the matrix of weights [H, Nq, Nk]."""
    groups = q.shape[1] // k.shape[1]
    q_HQC, k_HKC, v_HKC = (wide(x).transpose(0, 1) for x in (q, k, v))
    k_HKC, v_HKC = (x.repeat_interleave(groups, dim=0) for x in (k_HKC, v_HKC))
    at = torch.arange(k.shape[0], device=k.device)
    seen = (at >= spans.first_key[:, None]) & (at < spans.end_key[:, None])
    logits = (q_HQC @ k_HKC.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, float("-inf"))
    log_sums = logits.logsumexp(dim=-1)
    weights = (logits - log_sums.masked_fill(~seen.any(dim=1), 0.0)[..., None]).exp()
    return (weights @ v_HKC).transpose(0, 1).to(q.dtype), log_sums.detach()


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if {len(shape) for shape in shapes} != {3} or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"flash attention takes q [Nq, H, C], k and v [Nk, K, C], not {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly")
    if q.shape[2] > WIDEST:
        raise ValueError(f"flash attention takes heads of at most {WIDEST} channels, not {q.shape[2]}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(f"flash attention takes q, k and v in one of {', '.join(map(str, DTYPES))}, not {found}")
    if spans.first_key.shape != q.shape[:1] or spans.first_query.shape != k.shape[:1]:
        found = f"{len(spans.first_key)} queries and {len(spans.first_query)} keys"
        raise ValueError(f"the spans are of {found}, but q and k have {q.shape[0]} and {k.shape[0]}")
    if scale <= 0:
        raise ValueError(f"the scale of attention is positive, not {scale}")


@torch.library.custom_op("minka::flash_attention", mutates_args=())
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, first_query: Tensor, end_query: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (near(x) for x in (q, k, v))
    return forward(q, k, v, first_key, end_key, scale)


@torch.library.custom_op("minka::flash_attention_backward", mutates_args=())
def _flash_attention_backward(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, first_key: Tensor, end_key: Tensor,
    first_query: Tensor, end_query: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. Keys may be some of those that y and log_sums are of: then so are the gradients."""
    d_y, q, k, v, y = (near(x) for x in (d_y, q, k, v, y))
    return backward(d_y, q, k, v, y, log_sums, Spans(first_key, end_key, first_query, end_query), scale)


def near(x: Tensor) -> Tensor:
    """x with channels next to each other, and rows less than FAR apart; a copy only where they are not."""
    x = inner_contiguous(x)
    return x if x.stride(0) < FAR else x.contiguous()


@_flash_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, end_key: Tensor, first_query: Tensor, end_query: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    return y, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_flash_attention_backward.register_fake
def _(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, first_key: Tensor, end_key: Tensor,
    first_query: Tensor, end_query: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.minka.flash_attention_backward(d_y, *ctx.saved_tensors, ctx.scale)
    return (*found, None, None, None, None, None)


torch.library.register_autograd("minka::flash_attention", _gradients, setup_context=_save)
