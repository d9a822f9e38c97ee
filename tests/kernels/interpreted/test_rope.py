"""Rotation of queries and keys in the interpreter, with and without a norm of each head."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_checks import assert_near, exact
from minka.kernels.norm_rope import norm_rope
from minka.kernels.rope import rope

HALVES = (torch.float32, torch.float16)
SHAPES = ((1, 1, 1, 1, 2), (2, 7, 3, 1, 64), (1, 9, 6, 2, 96), (2, 3, 8, 8, 128), (1, 4, 8, 1, 256), (1, 0, 2, 1, 8))


def tables(rows: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(rows, tokens, 1, width // 2) * 9
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.double() + torch.cat(x.chunk(2, -1)[::-1], -1) * sin.double()


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["rotation", "norm and rotation"])
def test_values_and_gradients(shape: tuple[int, int, int, int, int], dtype: torch.dtype, norm: bool) -> None:
    batch, tokens, heads, groups, width = shape
    cos, sin = tables(batch, tokens, width)
    q = torch.randn(batch, tokens, heads, width).to(dtype).requires_grad_()
    k = torch.randn(batch, tokens, groups, width).to(dtype).requires_grad_()
    weights: Any = tuple(torch.randn(width).requires_grad_() for _ in range(2))
    d_q = torch.randn(batch, heads, tokens, width).to(dtype).transpose(1, 2)  # as attention hands it back
    d_k = torch.randn(k.shape).to(dtype)
    inputs = (q, k, *weights) if norm else (q, k)
    found = (
        norm_rope(q, k, weights[0], weights[1], 1e-5, cos, sin, "triton") if norm else rope(q, k, cos, sin, "triton")
    )
    wide = exact(*inputs)
    right = tuple(rotated(normalised(x, wide[2 + i]) if norm else x, cos, sin) for i, x in enumerate(wide[:2]))
    gradients = torch.autograd.grad(found, inputs, (d_q, d_k))
    expected = torch.autograd.grad(right, wide, (d_q.double(), d_k.double()))
    for one, other in zip((*found, *gradients), (*right, *expected), strict=True):
        assert_near(one, other)


def test_one_table_for_all_rows_and_strided_heads() -> None:
    """Positions that are the same in every row, and heads that are parts of one product."""
    cos, sin = tables(1, 5, 8)
    both = torch.randn(3, 5, 3 * 8 + 2 * 8, requires_grad=True)
    q, k = both[..., :24].unflatten(-1, (3, 8)), both[..., 24:].unflatten(-1, (2, 8))
    found = rope(q, k, cos, sin, "triton")
    assert_near(found[0], rotated(q.double(), cos, sin))
    assert_near(found[1], rotated(k.double(), cos, sin))


def test_positions_restart_at_documents() -> None:
    """Each token has its own row of the tables: equal positions are turned alike, wherever they are."""
    cos, sin = tables(1, 4, 8)
    at = torch.tensor([[0, 1, 2, 0, 1, 3]])
    x = torch.randn(1, 1, 1, 8).expand(1, 6, 1, 8)
    turned, _ = rope(x, x, cos[0, at], sin[0, at], "triton")
    assert torch.equal(turned[0, 0], turned[0, 3])
    assert torch.equal(turned[0, 1], turned[0, 4])
    assert not torch.equal(turned[0, 2], turned[0, 5])


def test_the_operators_are_torch_operators() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    cos, sin = tables(2, 3, 8)
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 2, 8, requires_grad=True)
    weights = tuple(torch.randn(8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.minka.rope, (q, k, cos, sin))
    torch.library.opcheck(torch.ops.minka.norm_rope, (q, k, *weights, 1e-5, cos, sin))
