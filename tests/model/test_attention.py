"""Structures of packed batches, and the calls of a kernel that this machine may not have."""

import inspect
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from minka.kernels import flash_attn_package, torch_attention
from minka.kernels.torch_attention import gpu_backends
from minka.model import attention as attention_module
from minka.model.attention import (
    Structure,
    allowed_pairs,
    attention,
    document_starts,
    document_structure,
    largest_logit,
)
from minka.plan.execution_choices import attention_kind
from models import packed

CPU = torch.device("cpu")


def structure(documents: Tensor | None) -> Structure:
    return document_structure(documents, varlen=False).to(CPU, torch.float32)


def test_rows_of_one_document_take_the_causal_kernel_and_others_a_mask() -> None:
    ids = torch.tensor([[3, 3, 3], [7, 7, 7]])
    assert structure(None).kind == structure(ids).kind == "causal"
    assert structure(torch.tensor([[0, 1]])).kind == "mask"
    mixed = structure(torch.tensor([[3, 3, 3], [0, 1, 1]]))
    assert mixed.kind == "mask"
    assert mixed.mask is not None
    inf = float("inf")
    assert mixed.mask[1, 0].tolist() == [[0, -inf, -inf], [-inf, 0, -inf], [-inf, 0, 0]]


def test_varlen_kernels_are_taken_where_they_can_run_and_a_mask_elsewhere() -> None:
    assert attention_kind("varlen", "cpu", "bf16") == "mask"
    assert attention_kind("auto", "cuda", "bf16") == "varlen"
    assert attention_kind("auto", "cuda", "fp32") == "mask"
    assert attention_kind("sdpa", "cuda", "bf16") == "mask"
    assert attention_kind("auto", "cpu", "bf16") == "mask"


def test_starts_are_cumulative_lengths_padded_to_a_power_of_two() -> None:
    documents = torch.tensor([[0, 0, 1, 1], [1, 2, 3, 3]])  # ids that meet across rows are two documents
    starts = document_starts(documents)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 2, 4, 5, 6, 8, 8, 8]
    assert document_starts(torch.zeros(1, 4, dtype=torch.int64)).tolist() == [0, 4]
    assert document_starts(torch.arange(3)[None]).tolist() == [0, 1, 2, 3]


def of_2_13(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
            window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """torch 2.13's contract, document by document."""
    assert window_size == (-1, 0)
    assert enable_gqa or q.shape[1] == k.shape[1]
    return by_document(q, k, v, cu_seq_q, max_q)


def of_2_10(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
            is_causal: bool = False) -> Tensor:  # fmt: skip
    """An older contract: no groups, causality by name."""
    assert is_causal
    assert q.shape == k.shape == v.shape
    return by_document(q, k, v, cu_seq_q, max_q)


def by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    y = torch.empty_like(q)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - begin <= longest
        a, b, c = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        y[begin:end] = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    return y


@pytest.mark.parametrize("kernel", [of_2_13, of_2_10])
def test_variable_length_kernels_are_called_rightly(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "VARLEN", kernel)
    monkeypatch.setattr(torch_attention, "VARLEN_TAKES", inspect.signature(kernel).parameters)
    _, documents, _, _ = packed(rows=3, length=20, vocab=300)
    q, k, v = (torch.randn(3, 20, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    varlen = Structure("varlen", documents, starts=document_starts(documents))
    torch.testing.assert_close(
        attention(q, k, v, varlen), attention(q, k, v, structure(documents)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_flash_attn_package_is_called_rightly(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every version takes these names; 4 returns the logarithms of the sums as well."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, causal: bool,
    ) -> Any:  # fmt: skip
        assert causal
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == 20
        y = by_document(q, k, v, cu_seqlens_q, max_seqlen_q)
        return (y, None) if version == 4 else y

    name = flash_attn_package.MODULES[version]
    module = ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    for part in {name, name.partition(".")[0]}:
        monkeypatch.setitem(sys.modules, part, module)
    for cached in (flash_attn_package.installed_version, flash_attn_package._function):
        cached.cache_clear()
    try:
        assert flash_attn_package.installed_version() == version
        _, documents, _, _ = packed(rows=3, length=20, vocab=300)
        q, k, v = (torch.randn(3, 20, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
        theirs = document_structure(documents, varlen=True, provider="flash-attn")
        torch.testing.assert_close(
            attention(q, k, v, theirs), attention(q, k, v, structure(documents)), rtol=1e-5, atol=1e-6
        )
    finally:
        for cached in (flash_attn_package.installed_version, flash_attn_package._function):
            cached.cache_clear()


@pytest.mark.parametrize("one_document", [False, True])
def test_a_gpu_gets_its_backends_in_order_and_keys_for_each_head_where_those_have_no_groups(
    one_document: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, documents, _, _ = packed(rows=3, length=20, vocab=300)
    documents = torch.zeros_like(documents) if one_document else documents
    q, k, v = (torch.randn(3, 20, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    as_gpu = document_structure(documents, varlen=False, as_gpu=True).to(q.device, q.dtype)
    assert as_gpu.capability == (9, 0)
    given: list[tuple[int, bool]] = []

    def seen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given.append((k.shape[1], options["enable_gqa"]))
        return F.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(torch_attention, "F", SimpleNamespace(scaled_dot_product_attention=seen))
    torch.testing.assert_close(attention(q, k, v, as_gpu), attention(q, k, v, structure(documents)))
    assert given == [(4, False), (2, True)]


def test_backends_of_a_gpu() -> None:
    half, single, hopper, turing = torch.bfloat16, torch.float32, (9, 0), (7, 5)
    fast, efficient = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), (SDPBackend.EFFICIENT_ATTENTION,)
    slow = (SDPBackend.MATH,)
    for width in (64, 100, 256):  # SDPA pads odd widths for flash
        assert gpu_backends(half, width, hopper, masked=False) == fast
    assert gpu_backends(half, 128, hopper, masked=True) == efficient
    assert gpu_backends(half, 320, hopper, masked=False) == efficient
    for masked in (True, False):
        assert gpu_backends(single, 100, hopper, masked=masked) == efficient
        assert gpu_backends(single, 64, turing, masked=masked) == efficient
        assert gpu_backends(torch.float16, 64, turing, masked=masked) == efficient
        assert gpu_backends(torch.float64, 64, hopper, masked=masked) == slow
        assert gpu_backends(half, 64, turing, masked=masked) == slow  # what is left there in bf16
        assert gpu_backends(single, 10, hopper, masked=masked) == slow
    assert gpu_backends(half, 100, hopper, masked=True) == slow
    assert gpu_backends(half, 300, hopper, masked=False) == slow


@pytest.mark.parametrize("length", [20, 128, 300])
def test_flex_attention_is_that_of_a_mask(length: int) -> None:
    """Forward: on a CPU torch has no backward."""
    _, documents, _, _ = packed(rows=3, length=length, vocab=300)
    flex = document_structure(documents, varlen=True, provider="flex").to(torch.device("cpu"), torch.float32)
    q, k, v = (torch.randn(3, heads, length, 8) for heads in (4, 2, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = attention(q, k, v, flex)
    torch.testing.assert_close(found, attention(q, k, v, structure(documents)), rtol=1e-5, atol=1e-5)


def test_blocks_of_flex_attention_are_those_that_torch_finds() -> None:
    _, documents, _, _ = packed(rows=2, length=300, vocab=300)
    flex = document_structure(documents, varlen=True, provider="flex").to(torch.device("cpu"), torch.float32)
    assert flex.blocks is not None
    theirs = create_block_mask(flex.blocks.mask_mod, None, None, 600, 600, device="cpu")
    for blocks in (flex.blocks, theirs):
        assert blocks.full_kv_num_blocks is not None
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(flex.blocks, name), getattr(theirs, name)), name
    assert torch.equal(flex.blocks.to_dense(), theirs.to_dense())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation within makes; views of `given` are none."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.given:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize("one_document", [False, True])
@pytest.mark.parametrize("queries", [1, 7, 50, 1000])
def test_the_probe_finds_the_largest_logit_in_bounded_memory(
    queries: int, one_document: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokens, heads, groups, width = 3, 50, 6, 2, 8
    monkeypatch.setattr(attention_module, "PROBE_BYTES", 4 * tokens * (heads // groups) * queries)
    _, documents, _, _ = packed(rows, tokens, vocab=300)
    q, k = (torch.randn(rows, tokens, h, width).transpose(1, 2) for h in (heads, groups))
    one, other = 30 * torch.eye(width)[:2]
    q[:, :, 0], k[:, :, -1] = one, one  # large, and after the query
    q[:, :, -1], k[:, :, 0] = other, other  # large, and in a different document where there are several
    at = documents[:1] * 0 if one_document else documents
    logits = q @ k.repeat_interleave(heads // groups, dim=1).transpose(2, 3) / width**0.5
    expected = logits.masked_fill(~allowed_pairs(at)[:, None], float("-inf")).amax()
    of = structure(None if one_document else documents)
    with Largest(q, k) as seen:
        found = largest_logit(q, k, of)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert seen.bytes <= max(attention_module.PROBE_BYTES, 4 * tokens * width)  # the latter: one head's keys
