"""What `make bench-kernels` times and the tests compare: each operation at sizes of real models, or tiny ones.

Bytes are the least that must move between memory and processor; FLOPs are those of matrix products alone.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minka.benchmarks.liger import liger_ways
from minka.kernels.adamw import Coefficients, adamw_
from minka.kernels.attention_spans import Spans, document_spans
from minka.kernels.choose import Own
from minka.kernels.cross_entropy import ALL_ROWS, cross_entropy_
from minka.kernels.flash_attention import flash_attention
from minka.kernels.flash_attn_package import packed_attention
from minka.kernels.flex_attention import block_mask, flex_packed
from minka.kernels.many_tensors import Chunks
from minka.kernels.norm_rope import norm_rope
from minka.kernels.rms_norm import add_rms_norm
from minka.kernels.rope import rope
from minka.kernels.squared_norm import squares_of_all
from minka.kernels.swiglu import swiglu
from minka.kernels.torch_attention import torch_sdpa, torch_varlen

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
    compiles: bool = True  # false: it is not part of what is compiled in training


Size = Literal["tiny", "middle", "full"]
TOKENS: dict[Size, int] = {"tiny": 12, "middle": 1000, "full": 16384}
WIDTHS: dict[str, dict[Size, tuple[int, ...]]] = {
    "rms_norm": {"tiny": (24,), "middle": (123, 4096), "full": (2048, 4096, 8192)},
    "rope": {"tiny": (16,), "middle": (64, 96, 128), "full": (64, 128)},
    "swiglu": {"tiny": (40,), "middle": (1000, 5632), "full": (5632, 14336)},
    "cross_entropy": {"tiny": (50,), "middle": (127, 32000), "full": (32000, 128256)},
    "attention": {"tiny": (16,), "middle": (64, 96, 128, 256), "full": (64, 128)},
}
TENSORS: dict[Size, tuple[int, int]] = {
    "tiny": (3, 40),
    "middle": (3, 5000),
    "full": (16, 2**22),
}  # how many, how large
Z_WEIGHT = 1e-4


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
    for half in (False, True):
        yield _adamw(*TENSORS[size], half=half)
    yield _grad_norm(*TENSORS[size])
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
    } | _liger("rms_norm")
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

    ways = {how: way(how) for how in ("torch", "triton")} | ({} if norm else _liger("rope"))
    size, tables = tokens * (heads + groups) * width, 8 * tokens * width
    moved = (4 * size + tables, (6 if norm else 4) * size + tables)
    note = "with norms of heads" if norm else "alone"
    return KernelCase("rope", width, note, make, 4 if norm else 2, ways, moved)


def _swiglu(tokens: int, width: int) -> KernelCase:
    ways = {
        "torch": lambda gate, up: (swiglu(gate, up),),
        "triton": lambda gate, up: (swiglu(gate, up, "triton"),),
    } | _liger("swiglu")
    size = tokens * width
    return KernelCase("swiglu", width, "", _random((tokens, width), (tokens, width)), 2, ways, (6 * size, 10 * size))


def _cross_entropy(tokens: int, vocab: int) -> KernelCase:
    """Forward writes the gradient over the logits: there is no backward. Logits that were gradients serve as well."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return *_random((tokens, vocab))(device, dtype), torch.randint(vocab, (tokens,), device=device)

    def way(how: Any) -> Callable[..., Outputs]:
        def call(logits: Tensor, targets: Tensor) -> Outputs:
            found = cross_entropy_(logits, targets, Z_WEIGHT, ALL_ROWS, gradient=True, hits=False, how=how)
            return found.loss, found.z_loss, logits

        return call

    ways = {how: way(how) for how in ("torch", "triton")} | _liger("cross_entropy")
    return KernelCase("cross_entropy", vocab, "", make, 0, ways, (4 * tokens * vocab, 0))


def _adamw(count: int, size: int, *, half: bool) -> KernelCase:
    """A step of AdamW on `count` matrices: weights, both moments, gradients; in bf16 stochastically rounded."""
    rates, places = Coefficients(1e-3, 0.9, 0.95, 1e-8), [(7 * i, 64, size, 0) for i in range(count)]
    made: dict[torch.device, Any] = {}  # of what is made once in training

    def make(device: torch.device, _: torch.dtype) -> tuple[Tensor, ...]:
        dtype = torch.bfloat16 if half else torch.float32
        return tuple(torch.rand(size, device=device).to(dtype) for _ in range(4 * count))

    def lists(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
        device = tensors[0].device
        if device not in made:
            decays, boxes = torch.full((count,), 0.1), torch.tensor(places).t().contiguous()
            scalars = torch.tensor(3.0), torch.tensor(2.0), torch.tensor(True), torch.tensor(0.0)
            made[device] = Chunks.of([size] * count, device), *(x.to(device) for x in (decays, boxes, *scalars))
        return [list(tensors[first : first + count]) for first in range(0, 4 * count, count)]

    def own(how: Own) -> Callable[..., Outputs]:
        def call(*tensors: Tensor) -> Outputs:
            by_name = dict(zip(("weights", "moments1", "moments2", "gradients"), lists(tensors), strict=True))
            chunks, decays, boxes, number, divisor, accept, _ = made[tensors[0].device]
            adamw_(by_name, chunks, decays, boxes, number, divisor, accept, rates, how)
            return tensors[: 3 * count]

        return call

    def fused(*tensors: Tensor) -> Outputs:
        w, m, v, g = lists(tensors)
        *_, number, divisor, _, refuse = made[w[0].device]
        torch._fused_adamw_(
            w, g, m, v, [], [number] * count, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8,
            amsgrad=False, maximize=False, grad_scale=divisor, found_inf=refuse,
        )  # fmt: skip
        return tensors[: 3 * count]

    ways = {"torch": own("torch") if half else fused, "triton": own("triton")}
    note, moved = ("bf16", 14) if half else ("fp32", 28)
    return KernelCase("adamw", 1, note, make, 0, ways, (moved * count * size, 0), compiles=False)


def _grad_norm(count: int, size: int) -> KernelCase:
    factors: dict[torch.device, Any] = {}

    def own(*tensors: Tensor) -> Outputs:
        device = tensors[0].device
        if device not in factors:
            ones = torch.ones(count, dtype=torch.float64, device=device)
            factors[device] = ones, Chunks.of([size] * count, device)
        return (squares_of_all(tensors, *factors[device]),)

    def torchs(*tensors: Tensor) -> Outputs:
        return (torch.stack(torch._foreach_norm(list(tensors))).double().square().sum(),)

    def make(device: torch.device, _: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(size, device=device) for _ in range(count))

    ways = {"torch": torchs, "triton": own}
    return KernelCase("grad_norm", 1, "fp32", make, 0, ways, (4 * count * size, 0), compiles=False)


def _liger(operation: str) -> dict[str, Callable[..., Outputs]]:
    ways = liger_ways(EPS, Z_WEIGHT)
    return {"liger": ways[operation]} if operation in ways else {}


class _Documents(NamedTuple):
    """Where documents begin, in every form that a way of attention takes; mask: of one row, bool."""

    starts: Tensor
    spans: Spans
    blocks: Any
    mask: Tensor | None
    capability: tuple[int, int] | None


def _attention(rows: int, length: int, heads: int, groups: int, width: int, documents: int) -> KernelCase:
    """Rows of one document or several, of uneven lengths; FLOPs are those of the pairs that see each other."""
    tokens = rows * length
    cuts = torch.tensor([0, *(length * (i * i) // documents**2 for i in range(1, documents + 1))])

    starts = torch.cat([cuts[:-1] + row * length for row in range(rows)] + [torch.tensor([tokens])]).int()
    made: dict[torch.device, _Documents] = {}  # of what is made once a micro-batch in training

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if device not in made:
            at = torch.searchsorted(cuts[1:], torch.arange(length), right=True)
            mask = (at[:, None] == at) & torch.ones(length, length, dtype=torch.bool).tril()
            on_device = starts.to(device)
            spans = document_spans(on_device, on_device, tokens, tokens)
            capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
            whole = None if documents == 1 else mask.to(device)
            made[device] = _Documents(on_device, spans, block_mask(spans), whole, capability)
        return _random((tokens, heads, width), (tokens, groups, width), (tokens, groups, width))(device, dtype)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        at = made[q.device].starts
        return (torch_varlen(q, k, v, at, at, length, length),)

    def package(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        at = made[q.device].starts
        return (packed_attention(q, k, v, at, at, length, length),)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        parts = [x.view(rows, length, -1, width).transpose(1, 2) for x in (q, k, v)]
        y = torch_sdpa(parts[0], parts[1], parts[2], made[q.device].mask, made[q.device].capability)
        return (y.transpose(1, 2).reshape(q.shape),)

    pairs = rows * int((cuts.diff() * (cuts.diff() + 1)).sum()) // 2
    flops = 4 * pairs * heads * width
    size = 2 * tokens * width * (2 * heads + 2 * groups)
    note = "one document a row" if documents == 1 else f"{documents} documents a row"
    ways: dict[str, Callable[..., Outputs]] = {
        "torch": torchs,
        "triton": lambda q, k, v: flash_attention(q, k, v, made[q.device].spans)[:1],
        "varlen": varlen,
        "flex": lambda q, k, v: (flex_packed(q, k, v, made[q.device].blocks),),
        "flash-attn": package,
    }
    return KernelCase("attention", width, note, make, 3, ways, (size, 2 * size), (flops, flops * 5 // 2))
