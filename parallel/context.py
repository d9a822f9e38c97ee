"""Context parallelism: each rank has some tokens of every sequence, and gathers the keys and values of all of them.

A sequence is cut into twice as many chunks as there are ranks, and rank r of c takes chunks r and 2c - 1 - r, one from
the head and one from the tail: a causal query's work grows with its place, so the sums are even (Llama 3,
arXiv:2407.21783, section 3.3.2). Rows of many short documents are less even under any cut.

B sequences · T tokens of a sequence · K key/value heads · C head width
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minka.kernels.choose import Provider
from minka.model.attention import ContextShard, Structure

# torch 2.13 renames the two and warns about the old names; 2.11 has only those.
_gather: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def places(length: int, ways: int, rank: int) -> Tensor:
    """Places of this rank's tokens in a sequence of `length`, int64 [length / ways]."""
    chunk = length // (2 * ways)
    every = torch.arange(length).view(2 * ways, chunk)
    return torch.cat((every[rank], every[2 * ways - 1 - rank]))


def gathered_places(length: int, ways: int) -> Tensor:
    """Places of the tokens of all ranks, in the order in which they are gathered, int64 [length]."""
    return torch.cat([places(length, ways, rank) for rank in range(ways)])


def shard_structure(
    documents_BT: Tensor, group: Any, *, varlen: bool, provider: Provider = "varlen", as_gpu: bool = False
) -> Structure:
    """The structure of this rank's queries and the whole sequence's keys. documents_BT: int64 ids of whole rows."""
    ways, rank, length = dist.get_world_size(group), dist.get_rank(group), documents_BT.shape[1]

    def gather(k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        both: Tensor = _GatherTokens.apply(torch.cat((k_BKTC, v_BKTC), dim=-1), group)
        return both.split(k_BKTC.shape[-1], dim=-1)

    shard = ContextShard(gather, places(length, ways, rank), gathered_places(length, ways))
    if not varlen:
        return Structure("mask", documents_BT, shard=shard, as_gpu=as_gpu)
    starts, key_starts, take, longest = varlen_segments(documents_BT, ways, rank)
    shard = replace(shard, take=take, key_starts=key_starts, longest=longest)
    return Structure("varlen", documents_BT, starts=starts, shard=shard, provider=provider)


def varlen_segments(documents_BT: Tensor, ways: int, rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """For variable-length kernels: (starts of the queries, of the keys, places of the keys, longest run of keys).

    Each of this rank's two chunks [a, e) of a row meets some documents; each such pair is a segment: its queries are
    the document's in [max(s, a), e), its keys those in [s, e), where the document begins at s, so that the last query
    is aligned with the last key. Keys are places in the gathered rows, flattened. Starts are int32 cumulative lengths.
    """
    batch, length = documents_BT.shape
    chunk, where = length // (2 * ways), torch.empty(length, dtype=torch.int64)
    where[gathered_places(length, ways)] = torch.arange(length)
    query_lengths, key_lengths, taken = [], [], []
    for row in range(batch):
        ids = documents_BT[row]
        begins = [0, *((ids[1:] != ids[:-1]).nonzero().flatten() + 1).tolist(), length]
        for first in (chunk * rank, chunk * (2 * ways - 1 - rank)):
            for s, e in itertools.pairwise(begins):
                if e > first and s < first + chunk:
                    end = min(e, first + chunk)
                    query_lengths.append(end - max(s, first))
                    key_lengths.append(end - s)
                    taken.append(where[s:end] + row * length)
    lengths = torch.tensor([[0, *query_lengths], [0, *key_lengths]], dtype=torch.int32)
    starts, key_starts = lengths.cumsum(1, dtype=torch.int32)
    return starts, key_starts, torch.cat(taken), max(key_lengths)


class _GatherTokens(torch.autograd.Function):
    """Every rank's [B, K, T/c, C], one after the other along T; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, part_BKTC: Tensor, group: Any) -> Tensor:
        ctx.group = group
        part = part_BKTC.movedim(2, 0).contiguous()
        whole = part.new_empty(part.shape[0] * dist.get_world_size(group), *part.shape[1:])
        _gather(whole, part, group=group)
        return whole.movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, grad_BKTC: Tensor) -> tuple[Tensor, None]:
        whole = grad_BKTC.movedim(2, 0).contiguous()
        part = whole.new_empty(whole.shape[0] // dist.get_world_size(ctx.group), *whole.shape[1:])
        _reduce_scatter(part, whole, group=ctx.group)
        return part.movedim(0, 2), None
