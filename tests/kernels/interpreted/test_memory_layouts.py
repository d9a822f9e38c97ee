"""Every operation reads what a tensor says, wherever its elements lie: views, gaps, steps, expanded gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_checks import assert_near
from minka.kernels.attention_spans import document_spans
from minka.kernels.flash_attention import attention_definition, flash_attention
from minka.kernels.norm_rope import norm_rope
from minka.kernels.rms_norm import add_rms_norm, rms_norm
from minka.kernels.rope import rope
from minka.kernels.swiglu import swiglu

WIDTH = 18
STARTS = torch.tensor([0, 1, 5, 9], dtype=torch.int32)
SPANS = document_spans(STARTS, STARTS, 9, 9)
ROW, HEADS, Q, K = (2, 3, WIDTH), (1, 6, 4, WIDTH), (9, 4, 16), (9, 2, 16)


def tables(transposed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The second one may lie differently from the first."""
    angles = torch.linspace(-3, 3, 6 * WIDTH // 2, dtype=dtype).view(1, 6, 1, WIDTH // 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    return cos, sin.transpose(1, 3).contiguous().transpose(1, 3) if transposed else sin


def rotated(q: Tensor, k: Tensor, how: Any) -> tuple[Tensor, Tensor]:
    return rope(q, k, *tables(how == "triton", q.dtype), how)


def normed(q: Tensor, k: Tensor, a: Tensor, b: Tensor, how: Any) -> tuple[Tensor, Tensor]:
    return norm_rope(q, k, a, b, 1e-5, *tables(how == "triton", q.dtype), how)


OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, w, how: rms_norm(x, w, 1e-5, how), (ROW, (WIDTH,))),
    "addition and norm": (lambda x, y, w, how: add_rms_norm(x, y, w, 1e-5, how), (ROW, ROW, (WIDTH,))),
    "swiglu": (swiglu, (ROW, ROW)),
    "rope": (rotated, (HEADS, (1, 6, 2, WIDTH))),
    "norm and rope": (normed, (HEADS, (1, 6, 2, WIDTH), (WIDTH,), (WIDTH,))),
    "attention": (
        lambda q, k, v, how: (flash_attention if how == "triton" else attention_definition)(q, k, v, SPANS)[0],
        (Q, K, K),
    ),
}


def laid_out(x: Tensor) -> Iterator[Tensor]:
    """The same numbers in other places."""
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    for wider, part in (((2,), slice(None, None, 2)), ((1,), slice(0, x.shape[-1]))):
        room = torch.full((*x.shape[:-1], wider[0] * x.shape[-1] + 3), float("nan"))[..., part]
        room[..., : x.shape[-1]] = x
        yield room[..., : x.shape[-1]]
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape)
    yield shifted.copy_(x)


def gradients(y: Tensor) -> Iterator[Tensor]:
    yield from laid_out(torch.randn(y.shape))
    yield torch.ones(1).expand(y.shape)
    yield torch.randn(1, *y.shape[1:]).expand(y.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_wherever_the_elements_lie(name: str) -> None:
    operation, shapes = OPERATIONS[name]
    for inputs in zip(*(laid_out(torch.randn(shape)) for shape in shapes), strict=True):
        learned = [x.detach().requires_grad_() for x in inputs]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        found, right = (as_tuple(operation(*some, how)) for some, how in ((learned, "triton"), (wide, "torch")))
        for given in zip(*(gradients(y) for y in found), strict=True):
            ours = torch.autograd.grad(found, learned, given, retain_graph=True)
            theirs = torch.autograd.grad(right, wide, [g.double() for g in given], retain_graph=True)
            for one, other in zip((*found, *ours), (*right, *theirs), strict=True):
                assert_near(one, other.detach())


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
