"""What `make bench-kernels` times and the tests compare: each operation at sizes of real models, or tiny ones.

Bytes are the least that must move between memory and processor; FLOPs are those of matrix products alone.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minka.kernels.attention_spans import document_spans
from minka.kernels.cross_entropy import ALL_ROWS, cross_entropy_
from minka.kernels.flash_attention import flash_attention
from minka.kernels.flash_attn_package import packed_attention
from minka.kernels.norm_rope import norm_rope
from minka.kernels.rms_norm import add_rms_norm
from minka.kernels.rope import rope
from minka.kernels.swiglu import swiglu
from minka.model.attention import torch_varlen

EPS = 1e-5
Outputs = tuple[Tensor, ...]


class KernelCase(NamedTuple):
    """`ways`: implementations of one operation, called with what `make` returns; the first `learned` have gradients."""

    operation: str
    width: int  # as in choices.toml
    note: str
    make: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    learned: int
    ways: Mapping[str, Callable[..., Outputs]]
    moved: tuple[int, int]  # bytes of forward and backward, in bf16
    flops: tuple[int, int] = (0, 0)


Size = Literal["tiny", "middle", "full"]
TOKENS: dict[Size, int] = {"tiny": 12, "middle": 1000, "full": 16384}
WIDTHS: dict[str, dict[Size, tuple[int, ...]]] = {
    "rms_norm": {"tiny": (24,), "middle": (123, 4096), "full": (2048, 4096, 8192)},
    "rope": {"tiny": (16,), "middle": (64, 96, 128), "full": (64, 128)},
    "swiglu": {"tiny": (40,), "middle": (1000, 5632), "full": (5632, 14336)},
    "cross_entropy": {"tiny": (50,), "middle": (127, 32000), "full": (32000, 128256)},
    "attention": {"tiny": (16,), "middle": (64, 96, 128, 256), "full": (64, 128)},
}


def kernel_cases(size: Size) -> Iterator[KernelCase]:
    """tiny: for any machine; middle: to be compared with fp64; full: as in training."""
    tokens, heads, groups = TOKENS[size], *((32, 8) if size == "full" else (4, 2))
    for width in WIDTHS["rms_norm"][size]:
        yield _norm(tokens, width)
    for width in WIDTHS["rope"][size]:
        yield _rope(tokens, heads, groups, width, norm=False)
        yield _rope(tokens, heads, groups, width, norm=True)
    for width in WIDTHS["swiglu"][size]:
        yield _swiglu(tokens, width)
    for vocab in WIDTHS["cross_entropy"][size]:
        yield _cross_entropy(tokens // 2, vocab)
    rows, length = (1, 24) if size == "tiny" else (2, 500) if size == "middle" else (2, 8192)
    for width in WIDTHS["attention"][size]:
        for documents in (1, 3):
            yield _attention(rows, length, heads, groups, width, documents)


def _random(*shapes: tuple[int, ...]) -> Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]:
    """Normal numbers: zeros would be faster, since they draw less power."""
    return lambda device, dtype: tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def _norm(tokens: int, width: int) -> KernelCase:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return *_random((tokens, width), (tokens, width))(device, dtype), torch.randn(width, device=device)

    ways = {
        "torch": lambda x, added, weight: add_rms_norm(x, added, weight, EPS, "aten"),
        "triton": lambda x, added, weight: add_rms_norm(x, added, weight, EPS, "triton"),
    }
    size = tokens * width
    return KernelCase("rms_norm", width, "after an addition", make, 3, ways, (8 * size, 8 * size))


def _rope(tokens: int, heads: int, groups: int, width: int, *, norm: bool) -> KernelCase:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k = _random((1, tokens, heads, width), (1, tokens, groups, width))(device, dtype)
        weights = (torch.randn(width, device=device), torch.randn(width, device=device)) if norm else ()
        angles = torch.randn(1, tokens, 1, width // 2, device=device)
        tables = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
        return q, k, *weights, *tables

    def way(how: Any) -> Callable[..., Outputs]:
        if norm:
            return lambda q, k, a, b, cos, sin: norm_rope(q, k, a, b, EPS, cos, sin, how)
        return lambda q, k, cos, sin: rope(q, k, cos, sin, how)

    ways = {how: way(how) for how in ("torch", "triton")}
    size, tables = tokens * (heads + groups) * width, 8 * tokens * width
    moved = (4 * size + tables, (6 if norm else 4) * size + tables)
    note = "with norms of heads" if norm else "alone"
    return KernelCase("rope", width, note, make, 4 if norm else 2, ways, moved)


def _swiglu(tokens: int, width: int) -> KernelCase:
    ways = {
        "torch": lambda gate, up: (swiglu(gate, up),),
        "triton": lambda gate, up: (swiglu(gate, up, "triton"),),
    }
    size = tokens * width
    return KernelCase("swiglu", width, "", _random((tokens, width), (tokens, width)), 2, ways, (6 * size, 10 * size))


def _cross_entropy(tokens: int, vocab: int) -> KernelCase:
    """Forward writes the gradient over the logits: there is no backward. Logits that were gradients serve as well."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return *_random((tokens, vocab))(device, dtype), torch.randint(vocab, (tokens,), device=device)

    def way(how: Any) -> Callable[..., Outputs]:
        def call(logits: Tensor, targets: Tensor) -> Outputs:
            found = cross_entropy_(logits, targets, 1e-4, ALL_ROWS, gradient=True, hits=False, how=how)
            return found.loss, found.z_loss, logits

        return call

    ways = {how: way(how) for how in ("torch", "triton")}
    return KernelCase("cross_entropy", vocab, "", make, 0, ways, (4 * tokens * vocab, 0))


def _attention(rows: int, length: int, heads: int, groups: int, width: int, documents: int) -> KernelCase:
    """Rows of one document or several, of uneven lengths; FLOPs are those of the pairs that see each other."""
    tokens = rows * length
    cuts = torch.tensor([0, *(length * (i * i) // documents**2 for i in range(1, documents + 1))])

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return _random((tokens, heads, width), (tokens, groups, width), (tokens, groups, width))(device, dtype)

    starts = torch.cat([cuts[:-1] + row * length for row in range(rows)] + [torch.tensor([tokens])]).int()
    places: dict[torch.device, Any] = {}  # of what is made once a micro-batch in training

    def own(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        if q.device not in places:
            on_device = starts.to(q.device)
            places[q.device] = document_spans(on_device, on_device, tokens, tokens)
        return flash_attention(q, k, v, places[q.device])[:1]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        on_device = starts.to(q.device)
        return (torch_varlen(q, k, v, on_device, on_device, length, length),)

    def package(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        on_device = starts.to(q.device)
        return (packed_attention(q, k, v, on_device, on_device, length, length),)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        parts = [x.view(rows, length, -1, width).transpose(1, 2) for x in (q, k, v)]
        at = torch.searchsorted(cuts[1:].to(q.device), torch.arange(length, device=q.device), right=True)
        mask = None
        if documents > 1:
            mask = (at[:, None] == at) & torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            parts[1:] = [x.repeat_interleave(heads // groups, dim=1) for x in parts[1:]]
        y = F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], attn_mask=mask, is_causal=mask is None, enable_gqa=documents == 1
        )
        return (y.transpose(1, 2).reshape(q.shape),)

    pairs = rows * int((cuts.diff() * (cuts.diff() + 1)).sum()) // 2
    flops = 4 * pairs * heads * width
    size = 2 * tokens * width * (2 * heads + 2 * groups)
    note = "one document a row" if documents == 1 else f"{documents} documents a row"
    ways = {"torch": torchs, "triton": own, "varlen": varlen, "flash-attn": package}
    return KernelCase("attention", width, note, make, 3, ways, (size, 2 * size), (flops, flops * 5 // 2))
