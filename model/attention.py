"""Causal attention that never crosses a document boundary, by the kernel that suits the device.

B batch · T tokens · H query heads · K key/value heads · C head width
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minka.kernels.attention_spans import Spans, document_spans
from minka.kernels.choose import Provider
from minka.kernels.flash_attention import flash_attention
from minka.kernels.flash_attn_package import packed_attention
from minka.kernels.flex_attention import block_mask, flex_packed
from minka.kernels.torch_attention import Capability, torch_sdpa, torch_varlen

TYPICAL = (9, 0)  # the compute capability of a GPU that is not there
PROBE_BYTES = 2**24  # of logits that the probe holds at once


@dataclass(frozen=True)
class ContextShard:
    """For queries that are some places of each row, while the keys of whole rows are gathered from other ranks.

    gather: keys and values [B, K, Tq, C] of this rank to those of whole rows [B, K, T, C], in the order `keys_at`, with
    the gradient going back. queries_at [Tq], keys_at [T]: places in the row, on the host. For varlen kernels: `take`
    picks keys from the flattened [B * T], `key_starts` belongs to `starts`, `longest` is the longest run of keys.
    """

    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    queries_at: Tensor
    keys_at: Tensor
    take: Tensor | None = None
    key_starts: Tensor | None = None
    longest: int = 0


@dataclass(frozen=True)
class Structure:
    """Which token may see which: made on the host, moved to the device once per micro-batch, shared by all blocks.

    Not a pytree, on purpose: FSDP2 casts the floating tensors that it finds in a module's arguments, and recomputation
    must see the value of its own micro-batch.
    """

    kind: Literal["causal", "mask", "varlen"]
    documents: Tensor | None = None  # [B, T] of whole rows, stays on the host; None: every row is one document
    starts: Tensor | None = None  # varlen: int32 cumulative lengths over the flattened batch, padded with B*T
    shard: ContextShard | None = None  # None: queries and keys are whole rows
    mask: Tensor | None = None  # [B, 1, Tq, Tk], 0 where allowed and -inf elsewhere; made by `to`
    provider: Provider = "varlen"  # of varlen: whose kernels
    spans: Spans | None = None  # of Triton's kernels: which key each query sees; made by `to`
    blocks: BlockMask | None = None  # the same for FlexAttention; made by `to`
    capability: Capability | None = None  # the GPU's, from which SDPA's backends follow; made by `to`
    as_gpu: bool = False  # as on a GPU, on any device

    def to(self, device: torch.device, dtype: torch.dtype) -> "Structure":
        """The structure for activations of `dtype` on `device`; the host waits for nothing if its memory is pinned."""

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        capability: Capability | None = TYPICAL if self.as_gpu else None
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
        if self.kind == "mask":
            at = (None, None) if self.shard is None else (self.shard.queries_at, self.shard.keys_at)
            allowed_BQK = allowed_pairs(*map(move, (self.documents, *at)))
            mask = torch.zeros(allowed_BQK.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(~allowed_BQK, float("-inf"))[:, None]
            return replace(self, mask=mask, capability=capability)
        shard = self.shard and replace(self.shard, take=move(self.shard.take), key_starts=move(self.shard.key_starts))
        moved = replace(self, starts=move(self.starts), shard=shard, capability=capability)
        if self.kind == "varlen" and self.provider == "triton":
            return replace(moved, spans=moved._spans())
        if self.kind == "varlen" and self.provider == "flex":
            return replace(moved, blocks=block_mask(moved._spans()))
        return moved

    def _spans(self) -> Spans:
        assert self.starts is not None  # it is varlen
        assert self.documents is not None
        rows, length = self.documents.shape
        if self.shard is None:
            return document_spans(self.starts, self.starts, rows * length, rows * length)
        assert self.shard.take is not None
        assert self.shard.key_starts is not None
        queries = rows * len(self.shard.queries_at)
        return document_spans(self.starts, self.shard.key_starts, queries, len(self.shard.take))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclass with `change` applied to each tensor in it, at any depth."""
    if isinstance(value, Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})


def document_structure(
    documents_BT: Tensor | None, *, varlen: bool, provider: Provider = "varlen", as_gpu: bool = False
) -> Structure:
    """The structure of whole rows; provider: of variable-length kernels.

    documents_BT: int64 ids on the host, equal exactly within a document, whose tokens are consecutive; None: one
    document a row.
    """
    if documents_BT is None:
        return Structure("causal", as_gpu=as_gpu)
    if varlen:
        return Structure("varlen", documents_BT, starts=document_starts(documents_BT), provider=provider)
    if torch.equal(documents_BT[:, 1:], documents_BT[:, :-1]):
        return Structure("causal", as_gpu=as_gpu)  # the causal kernel skips half of the work
    return Structure("mask", documents_BT, as_gpu=as_gpu)


def document_starts(documents_BT: Tensor) -> Tensor:
    """Cumulative lengths of the documents of the flattened batch, int32, padded to a power of two by empty documents.

    A size that always suffices (B*T) costs more in empty blocks of the kernel; powers of two are few sizes, so few
    compilations.
    """
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first.flatten().nonzero().flatten().to(torch.int32)
    size = 1 << starts.numel().bit_length()  # room for the end
    return F.pad(starts, (0, size - starts.numel()), value=documents_BT.numel())


def attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, structure: Structure) -> Tensor:
    """softmax(q k' / sqrt(C)) v over the allowed pairs: [B, H, T, C]. K divides H (grouped queries)."""
    if structure.shard is not None:
        k_BKTC, v_BKTC = structure.shard.gather(k_BKTC, v_BKTC)
    if structure.kind == "varlen":
        return _varlen(q_BHTC, k_BKTC, v_BKTC, structure)
    return torch_sdpa(q_BHTC, k_BKTC, v_BKTC, structure.mask, structure.capability)


def allowed_pairs(documents_BT: Tensor, queries_at: Tensor | None = None, keys_at: Tensor | None = None) -> Tensor:
    """Bool [B, Tq, Tk]: whether the query (rows) may see the key (columns). Places in the row; None: all, in order."""
    every = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    q = every if queries_at is None else queries_at
    k = every if keys_at is None else keys_at
    return (documents_BT[:, q, None] == documents_BT[:, None, k]) & (q[:, None] >= k)


@torch.no_grad()
def largest_logit(q_BHTC: Tensor, k_BKTC: Tensor, structure: Structure) -> Tensor:
    """The largest scaled logit of any head over the allowed pairs; scalar fp32.

    It takes some queries of one group of heads at a time: at most PROBE_BYTES of logits, or those of one query.
    """
    device, shard, documents = q_BHTC.device, structure.shard, structure.documents
    if shard is not None:
        k_BKTC, _ = shard.gather(k_BKTC, k_BKTC)
    batch, heads, tokens, width = q_BHTC.shape
    groups, keys = k_BKTC.shape[1], k_BKTC.shape[2]
    queries_at = keys_at = torch.arange(keys, device=device)
    if shard is not None:
        queries_at, keys_at = (at.to(device, non_blocking=True) for at in (shard.queries_at, shard.keys_at))
    if documents is None:
        documents = torch.zeros(batch, keys, device=device)
    documents = documents.to(device, non_blocking=True)
    queries = max(1, PROBE_BYTES // (4 * keys * (heads // groups)))
    largest = torch.full((), float("-inf"), device=device)
    for b in range(batch):
        q_KGTC = q_BHTC[b].unflatten(0, (groups, heads // groups))
        for first in range(0, tokens, queries):
            some = slice(first, first + queries)
            hidden = ~allowed_pairs(documents[b : b + 1], queries_at[some], keys_at)[0]
            for group in range(groups):
                logits_GQT = q_KGTC[group, :, some].float() @ k_BKTC[b, group].float().T
                largest = torch.maximum(largest, logits_GQT.masked_fill_(hidden, float("-inf")).amax())
    return largest / width**0.5


def _varlen(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, structure: Structure) -> Tensor:
    batch, _, tokens, _ = q_BHTC.shape
    q, k, v = (rearrange(x, "b h t c -> (b t) h c") for x in (q_BHTC, k_BKTC, v_BKTC))
    starts, key_starts, longest = structure.starts, structure.starts, tokens
    if structure.shard is not None:
        k, v = k[structure.shard.take], v[structure.shard.take]
        key_starts, longest = structure.shard.key_starts, structure.shard.longest
    assert starts is not None
    assert key_starts is not None
    if structure.provider == "triton":
        assert structure.spans is not None
        y, _ = flash_attention(q, k, v, structure.spans)
    elif structure.provider == "flex":
        assert structure.blocks is not None
        y = flex_packed(q, k, v, structure.blocks)
    elif structure.provider == "flash-attn":
        y = packed_attention(q, k, v, starts, key_starts, tokens, longest)
    else:
        y = torch_varlen(q, k, v, starts, key_starts, tokens, longest)
    return rearrange(y, "(b t) h c -> b h t c", b=batch)
