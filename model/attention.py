"""Causal attention that never crosses a document boundary, by whichever kernel suits the device.

B batch · T tokens · H query heads · K key/value heads · C head width
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minka.plan.config_sections import KernelsSection
from minka.plan.errors import UserError

HALF = (torch.bfloat16, torch.float16)
VARLEN: Callable[..., Any] = varlen_attn  # its signature differs between torch 2.11 and 2.13
PROBE_BYTES = 2**24  # of logits that the probe holds at once
VARLEN_TAKES = inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Structure:
    """Which token may see which, computed once a forward pass and handed to every block.

    No pytree on purpose: FSDP2 casts the floating tensors it finds in a module's arguments, and recompute must see
    the very value that its own micro-batch had.
    """

    kind: Literal["causal", "mask", "varlen"]
    documents: Tensor | None = None  # [B, T] of the whole rows; None: every row is one document
    mask: Tensor | None = None  # [B, 1, Tq, Tk], 0 where allowed and -inf elsewhere
    starts: Tensor | None = None  # int32 cumulative lengths over the flattened batch, padded with B*T
    part: "ContextShard | None" = None  # None: queries and keys are whole rows


@dataclass(frozen=True)
class ContextShard:
    """Of queries that are a part of each row, while the keys of the whole row are gathered from elsewhere.

    gather: keys and values [B, K, Tq, C] of this part to those of the row [B, K, T, C], in the order `keys_at`, with
    the gradient going back. queries_at [Tq], keys_at [T]: their places in the row. For varlen kernels: keys are taken
    by `take` from the flattened [B * T], and `key_starts` goes with `starts` (see `varlen_part`).
    """

    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    queries_at: Tensor
    keys_at: Tensor
    take: Tensor | None = None
    key_starts: Tensor | None = None
    longest: int = 0


def document_structure(
    documents_BT: Tensor | None, kernels: KernelsSection, *, device: torch.device, dtype: torch.dtype
) -> Structure:
    """The structure of a batch whose activations have `dtype` on `device`.

    documents_BT: int64 ids, equal exactly within a document, whose tokens lie side by side; None: one document a row.
    With varlen kernels, ids that are still on the CPU spare the device a synchronisation.
    Raises UserError where kernels.attention cannot run.
    """
    if documents_BT is None:
        return Structure("causal")
    possible = device.type == "cuda" and dtype in HALF
    if kernels.attention == "varlen" and not possible:
        raise UserError(
            f"variable-length attention cannot run on {device.type} in {str(dtype).removeprefix('torch.')}",
            where="kernels.attention",
            why="its kernels are for CUDA devices in half precision",
            remedy='set kernels.attention="auto", or layout.precision="bf16" on a GPU',
        )
    if possible and kernels.attention != "sdpa":
        return Structure("varlen", documents_BT.to(device), starts=_starts(documents_BT).to(device, non_blocking=True))
    if documents_BT.device.type == "cpu" and torch.equal(documents_BT[:, 1:], documents_BT[:, :-1]):
        return Structure("causal")  # the causal kernel skips half of the work
    documents_BT = documents_BT.to(device)
    return Structure("mask", documents_BT, mask=additive(allowed_pairs(documents_BT), dtype))


def attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, structure: Structure) -> Tensor:
    """softmax(q k' / sqrt(C)) v over the allowed pairs: [B, H, T, C]. K divides H (grouped queries)."""
    if structure.part is not None:
        k_BKTC, v_BKTC = structure.part.gather(k_BKTC, v_BKTC)
    if structure.kind == "varlen":
        return _varlen(q_BHTC, k_BKTC, v_BKTC, structure)
    return F.scaled_dot_product_attention(
        q_BHTC,
        k_BKTC,
        v_BKTC,
        attn_mask=structure.mask,
        is_causal=structure.mask is None,
        enable_gqa=q_BHTC.shape[1] != k_BKTC.shape[1],
    )


def allowed_pairs(documents_BT: Tensor, queries_at: Tensor | None = None, keys_at: Tensor | None = None) -> Tensor:
    """Bool [B, Tq, Tk]: whether the query (rows) may see the key (columns). Places in the row; None: all, in order."""
    every = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    q = every if queries_at is None else queries_at
    k = every if keys_at is None else keys_at
    return (documents_BT[:, q, None] == documents_BT[:, None, k]) & (q[:, None] >= k)


def additive(allowed_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [B, 1, Tq, Tk] of allowed pairs: 0, or -inf where a pair is not allowed."""
    mask = torch.zeros(allowed_BQK.shape, dtype=dtype, device=allowed_BQK.device)
    return rearrange(mask.masked_fill_(~allowed_BQK, float("-inf")), "b q k -> b 1 q k")


@torch.no_grad()
def largest_logit(q_BHTC: Tensor, k_BKTC: Tensor, structure: Structure) -> Tensor:
    """The largest scaled logit of any head over the allowed pairs; scalar fp32.

    Some queries of one group of heads at a time: never more than PROBE_BYTES of logits, or those of one query.
    """
    if structure.part is not None:
        k_BKTC, _ = structure.part.gather(k_BKTC, k_BKTC)
    batch, heads, tokens, width = q_BHTC.shape
    groups, keys = k_BKTC.shape[1], k_BKTC.shape[2]
    queries = max(1, PROBE_BYTES // (4 * keys * (heads // groups)))
    largest = torch.full((), float("-inf"), device=q_BHTC.device)
    for b in range(batch):
        q_KGTC = q_BHTC[b].unflatten(0, (groups, heads // groups))
        for first in range(0, tokens, queries):
            hidden = ~_allowed_queries(structure, b, slice(first, first + queries), keys, q_BHTC.device)
            for group in range(groups):
                keys_CT = k_BKTC[b, group].float().T
                logits_GQT = q_KGTC[group, :, first : first + queries].float() @ keys_CT
                largest = torch.maximum(largest, logits_GQT.masked_fill_(hidden, float("-inf")).amax())
    return largest / width**0.5


def _allowed_queries(structure: Structure, row: int, some: slice, keys: int, device: torch.device) -> Tensor:
    """Bool [queries, keys]: those rows of `allowed_pairs`."""
    every = torch.arange(keys, device=device)
    q = (every if structure.part is None else structure.part.queries_at)[some]
    k = every if structure.part is None else structure.part.keys_at
    if structure.documents is None:
        return q[:, None] >= k
    return allowed_pairs(structure.documents[row : row + 1], q, k)[0]


def _varlen(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, structure: Structure) -> Tensor:
    batch, heads, tokens, _ = q_BHTC.shape
    groups = heads // k_BKTC.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_TAKES else {"is_causal": True}
    if groups > 1 and "enable_gqa" in VARLEN_TAKES:
        options["enable_gqa"] = True
    elif groups > 1:
        k_BKTC, v_BKTC = k_BKTC.repeat_interleave(groups, dim=1), v_BKTC.repeat_interleave(groups, dim=1)
    q, k, v = (rearrange(x, "b h t c -> (b t) h c") for x in (q_BHTC, k_BKTC, v_BKTC))
    starts, key_starts, longest = structure.starts, structure.starts, tokens
    if structure.part is not None:
        k, v = k[structure.part.take], v[structure.part.take]
        key_starts, longest = structure.part.key_starts, structure.part.longest
    y: Tensor = VARLEN(q, k, v, starts, key_starts, tokens, longest, **options)
    return rearrange(y, "(b t) h c -> b h t c", b=batch)


def _starts(documents_BT: Tensor) -> Tensor:
    """Cumulative lengths of the documents of the flattened batch, padded to a power of two by empty documents.

    The number of documents must come to the host: a size that always suffices (B*T) costs more in empty blocks of
    the kernel than one synchronisation does, and a smaller fixed one would be wrong without a word.
    """
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first.flatten().nonzero().flatten().to(torch.int32)
    size = 1 << starts.numel().bit_length()  # room for the end; few sizes, so few compilations
    return F.pad(starts, (0, size - starts.numel()), value=documents_BT.numel())
