"""torch's own causal attention: SDPA with its backends in explicit order, and variable-length kernels."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

VARLEN: Callable[..., Any] = varlen_attn  # its signature differs between torch 2.11 and 2.13
VARLEN_TAKES = inspect.signature(varlen_attn).parameters
CUDNN_LENGTH = 128  # cuDNN's backward was wrong at some other lengths (pytorch#196678)

FLASH_WIDEST = 256

Backends = tuple[SDPBackend, ...]
Capability = tuple[int, int]  # of a GPU


def gpu_backends(dtype: torch.dtype, width: int, capability: Capability, *, masked: bool) -> Backends:
    """SDPA's backends for heads of `width` channels on a GPU, the fastest first; of any that would follow none could.

    cuDNN's is not taken by some versions of torch by themselves (pytorch#142132), and can give NaN with a mask. MATH
    holds all logits: it is there where nothing else runs.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if half and capability >= (8, 0) and not masked and width <= FLASH_WIDEST:
        return SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    aligned = width % (8 if half else 4) == 0
    if dtype == torch.float64 or not aligned or (dtype == torch.bfloat16 and capability < (8, 0)):
        return (SDPBackend.MATH,)
    return (SDPBackend.EFFICIENT_ATTENTION,)


def torch_sdpa(
    q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, mask: Tensor | None = None, capability: Capability | None = None
) -> Tensor:
    """softmax(q k' / sqrt(C) + mask) v, [B, H, T, C]; causal without a mask. K divides H.

    capability: that of the GPU, whose backends are then named in order; None: torch's choice. The memory-efficient one
    has no groups: each query head gets its own keys, where torch would take its slowest backend without a word.
    """
    groups = q_BHTC.shape[1] // k_BKTC.shape[1]
    backends: Backends = ()
    if capability is not None:
        backends = gpu_backends(q_BHTC.dtype, q_BHTC.shape[-1], capability, masked=mask is not None)
    if q_BHTC.shape[2] % CUDNN_LENGTH:
        backends = tuple(one for one in backends if one != SDPBackend.CUDNN_ATTENTION)
    if groups > 1 and backends[:1] == (SDPBackend.EFFICIENT_ATTENTION,):
        k_BKTC, v_BKTC, groups = (*(x.repeat_interleave(groups, dim=1) for x in (k_BKTC, v_BKTC)), 1)
    with _in_order(backends if q_BHTC.is_cuda else ()):  # a dry run's tensors are on the CPU, which has others
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )


def _in_order(backends: Sequence[SDPBackend]) -> Any:
    return sdpa_kernel(list(backends), set_priority=True) if backends else nullcontext()


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Causal attention of documents aligned bottom-right, [tokens, H, C]; starts: int32 cumulative lengths."""
    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_TAKES else {"is_causal": True}
    if groups > 1 and "enable_gqa" in VARLEN_TAKES:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y: Tensor = VARLEN(q, k, v, starts, key_starts, longest_q, longest_k, **options)
    return y
