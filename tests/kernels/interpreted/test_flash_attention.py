"""Flash attention in the interpreter."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_checks import assert_near, exact
from minka.kernels.attention_spans import Spans, causal_spans, document_spans
from minka.kernels.flash_attention import attention_definition, flash_attention, near
from minka.kernels.flash_attention_forward import WIDEST
from minka.parallel.context import varlen_segments

HALVES = (torch.float32, torch.float16)
# Of gradients, as for bf16 larger than of one rounding: weights, y, and gradients of logits are rounded before.
GRADIENTS = {torch.float32: 1e-5, torch.float16: 5e-4}


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def qkv(queries: int, keys: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> Any:
    shapes = (queries, heads, width), (keys, groups, width), (keys, groups, width)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(inputs: Any, between: Spans, scale: float | None = None, slack: float = 1.0) -> None:
    """Values and gradients against the formula in fp64. A gradient is measured by how large its terms are."""
    q, k, v = inputs
    y, log_sums = flash_attention(q, k, v, between, scale)
    d_y = torch.randn(y.shape).to(y.dtype)
    wide: Any = exact(*inputs)
    right, right_sums = attention_definition(wide[0], wide[1], wide[2], between, scale)
    assert_near(y, right)
    assert_near(log_sums, right_sums, 1e-5)
    found = torch.autograd.grad(y, inputs, d_y)
    expected = torch.autograd.grad(right, wide, d_y.double())
    for gradient, one, tensor in zip(found, expected, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.isfinite().all()
        size = max(float(one.norm()), 0.1 * float(d_y.double().norm()))  # the former is 0 for a single token
        assert float((gradient.double() - one).norm()) <= slack * GRADIENTS[y.dtype] * size


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "width"),
    [
        ((1,), 1, 1, 16),
        ((7,), 4, 1, 64),
        ((127, 2), 8, 1, 8),
        ((129,), 2, 2, 16),
        ((1, 1, 5, 1, 30, 1), 4, 2, 64),
        ((20, 13), 2, 1, 96),
        ((3, 40), 8, 2, 128),
        ((17, 9), 1, 1, 256),
        ((150, 1, 130), 2, 1, 16),
        ((300,), 2, 1, 16),
    ],
    ids=str,
)
def test_documents(lengths: tuple[int, ...], heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    """Causal within each document, padded with empty ones."""
    ends, total = starts(*lengths, 0, 0, 0), sum(lengths)
    check(qkv(total, total, heads, groups, width, dtype), document_spans(ends, ends, total, total))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_queries_of_a_context_rank(rank: int, dtype: torch.dtype) -> None:
    """Some queries of each document, and all of its keys up to them: unequal lengths, aligned bottom-right."""
    documents = torch.tensor([[0] * 20 + [1] * 5 + [2] * 39, [0] * 64])
    q_starts, k_starts, take, _ = varlen_segments(documents, 2, rank)
    between = document_spans(q_starts, k_starts, int(q_starts[-1]), len(take))
    check(qkv(int(q_starts[-1]), len(take), 4, 2, 16, dtype), between)


def test_rows_that_are_one_document_each() -> None:
    rows, length = 3, 20
    ends = starts(*[length] * rows)
    between = causal_spans(rows, length, torch.device("cpu"))
    for one, other in zip(between, document_spans(ends, ends, rows * length, rows * length), strict=True):
        assert torch.equal(one, other)
    check(qkv(rows * length, rows * length, 2, 1, 16, torch.float32), between)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
def test_magnitudes(size: float, dtype: torch.dtype) -> None:
    """Logits of up to some thousands: one weight is 1 and the others are 0.

    Weights near 1 leave of a gradient the difference of dy v and dy y, where y is rounded: twice the bound. A logit of
    2,000 is itself rounded by 1e-4 in fp32, in whatever order the machine's products are summed: eight times.
    """
    ends = starts(33, 7)
    inputs = qkv(40, 40, 2, 1, 16, dtype)
    inputs[0] = (inputs[0].detach() * size).requires_grad_()
    rounded = size > 100 and dtype == torch.float32
    check(inputs, document_spans(ends, ends, 40, 40), slack=8.0 if rounded else 2.0)


def test_strides_and_a_scale() -> None:
    """Heads that are parts of one product, keys whose heads come first, a gradient that is transposed."""
    between = causal_spans(1, 21, torch.device("cpu"))
    packed = torch.randn(21, 4 * 16 + 2 * 16)
    q = packed[:, :64].unflatten(1, (4, 16)).requires_grad_()
    k = torch.randn(2, 21, 16).transpose(0, 1).requires_grad_()
    v = packed[:, 64:].unflatten(1, (2, 16)).requires_grad_()
    check([q, k, v], between, scale=0.3)


def test_a_query_without_keys_is_0() -> None:
    ends = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 3], dtype=torch.int32)
    inputs = qkv(5, 3, 1, 1, 16, torch.float32)
    y, log_sums = flash_attention(inputs[0], inputs[1], inputs[2], document_spans(*ends, 5, 3))
    assert torch.equal(y[:2], torch.zeros_like(y[:2]))
    assert torch.equal(log_sums[:, :2], torch.full((1, 2), float("-inf")))
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:2].any()


def test_nothing_at_all() -> None:
    between = causal_spans(0, 4, torch.device("cpu"))
    q, k, v = qkv(0, 0, 2, 1, 16, torch.float32)
    y, log_sums = flash_attention(q, k, v, between)
    assert (y.shape, log_sums.shape) == ((0, 2, 16), (2, 0))


def test_gradients_are_sums_over_blocks_of_keys() -> None:
    """As around a ring of ranks: each block of keys is given y and the sums over all keys."""
    heads, length, cut = 2, 90, 37
    q, k, v = (x.detach() for x in qkv(length, length, heads, 1, 16, torch.float32))
    d_y, whole = torch.randn_like(q), causal_spans(1, length, torch.device("cpu"))
    y, log_sums = flash_attention(q, k, v, whole)
    backward = torch.ops.minka.flash_attention_backward
    right = backward(d_y, q, k, v, y, log_sums, *whole, 0.25)
    parts = []
    for first, end in ((0, cut), (cut, length)):
        first_key, end_key = (x.clamp(first, end) - first for x in (whole.first_key, whole.end_key))
        between = Spans(first_key, end_key, whole.first_query[first:end], whole.end_query[first:end])
        parts.append(backward(d_y, q, k[first:end], v[first:end], y, log_sums, *between, 0.25))
    assert_near(parts[0][0] + parts[1][0], right[0])
    for index in (1, 2):
        assert_near(torch.cat((parts[0][index], parts[1][index])), right[index])


def test_two_runs_are_equal() -> None:
    between = causal_spans(1, 70, torch.device("cpu"))
    inputs = qkv(70, 70, 4, 2, 16, torch.float16)
    runs = []
    for _ in range(2):
        y, log_sums = flash_attention(inputs[0], inputs[1], inputs[2], between)
        runs.append((y, log_sums, *torch.autograd.grad(y.float().square().sum(), inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("shapes", "dtype", "scale", "message"),
    [
        (((4, 1, 320), (4, 1, 320)), torch.float32, 1.0, f"at most {WIDEST} channels, not 320"),
        (((4, 3, 16), (4, 2, 16)), torch.float32, 1.0, "3 query heads cannot share 2"),
        (((4, 2, 16), (4, 2, 32)), torch.float32, 1.0, r"not \[\(4, 2, 16\), \(4, 2, 32\)"),
        (((1, 4, 2, 16), (1, 4, 2, 16)), torch.float32, 1.0, "takes q"),
        (((4, 2, 16), (4, 2, 16)), torch.float64, 1.0, "not torch.float64"),
        (((5, 2, 16), (4, 2, 16)), torch.float32, 1.0, "spans are of 4 queries and 4 keys, but q and k have 5 and 4"),
        (((4, 2, 16), (4, 2, 16)), torch.float32, -1.0, "positive, not -1"),
    ],
)
def test_what_cannot_be_computed_is_refused(shapes: Any, dtype: torch.dtype, scale: float, message: str) -> None:
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in (shapes[0], shapes[1], shapes[1]))
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, causal_spans(1, 4, torch.device("cpu")), scale)


def test_rows_that_are_far_apart_are_brought_together() -> None:
    """Offsets within a block are in 32 bits."""
    far = torch.empty_strided((128, 1, 16), (2**24, 16, 1), device="meta")
    assert near(far).is_contiguous()
    close = torch.empty_strided((128, 4, 16), (16, 4096, 1), device="meta")
    assert near(close) is close


def test_the_operators_are_torch_operators() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    between = causal_spans(1, 6, torch.device("cpu"))
    q, k, v = qkv(6, 6, 2, 1, 16, torch.float32)
    torch.library.opcheck(torch.ops.minka.flash_attention, (q, k, v, *between, 0.25))
    q, k, v = (x.detach() for x in (q, k, v))
    y, log_sums = flash_attention(q, k, v, between)
    given = (torch.ones_like(y), q, k, v, y, log_sums, *between, 0.25)
    torch.library.opcheck(torch.ops.minka.flash_attention_backward, given)
