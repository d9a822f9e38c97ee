"""Attention over packed documents by torch's FlexAttention, which compiles a kernel for the mask."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minka.kernels.attention_spans import Spans

BLOCK = 128  # queries and keys of a block that is looked at, or not


def block_mask(spans: Spans) -> BlockMask:
    """Which blocks of queries look at which blocks of keys, of one row of all tokens.

    torch's own create_block_mask asks its function for every pair of tokens, which takes longer than the attention.
    Spans rise from query to query: what the first and the last one of a block see is what the block sees.
    """
    device, queries, keys = spans.end_key.device, len(spans.end_key), len(spans.end_query)
    rows = torch.arange(-(-queries // BLOCK) * BLOCK, device=device).clamp(max=queries - 1).view(-1, BLOCK)
    first, end = spans.first_key[rows], spans.end_key[rows]
    begin = torch.arange(0, keys, BLOCK, device=device)
    some = (first.amin(dim=1)[:, None] < begin + BLOCK) & (end.amax(dim=1)[:, None] > begin)
    whole = (first.amax(dim=1)[:, None] <= begin) & (end.amin(dim=1)[:, None] >= begin + BLOCK)
    first_key, end_key = spans.first_key, spans.end_key

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_key[query]) & (key < end_key[query])

    partial, full = _ordered(some & ~whole), _ordered(whole)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(queries, keys))


def _ordered(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those come first; int32 [1, 1, ...]."""
    order = blocks_QK.int().argsort(dim=1, descending=True, stable=True)
    return blocks_QK.sum(dim=1).int()[None, None], order.int()[None, None]


def flex_packed(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Causal attention of documents, [tokens, H, C]; K divides H. On a CPU without backward, and all logits at once."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    function: Any = _compiled() if q.is_cuda else flex_attention
    y: Tensor = function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
