"""The operations with a backward of their own are their formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minka.kernels.rms_norm import rms_norm
from minka.kernels.rope import rotate
from minka.kernels.swiglu import swiglu

B, T, H, C = 2, 5, 3, 8


def norm_definition(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight


def rotate_definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-3)


def turn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(B, T, 1, C // 2).to(dtype) * 6
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)


Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[torch.dtype], tuple[Tensor, ...]], int]


def inputs(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


CASES: dict[str, Case] = {
    "norm": (norm, norm_definition, inputs((B, T, C), (C,)), 2),
    "norm of heads": (norm, norm_definition, inputs((B, T, H, C), (C,)), 2),
    "rotate": (rotate, rotate_definition, lambda dtype: (*inputs((B, T, H, C))(dtype), *turn(dtype)), 1),
    "swiglu": (swiglu, swiglu_definition, inputs((B, T, C), (B, T, C)), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_formula_s(case: str) -> None:
    ours, formula, make, learned = CASES[case]
    arguments = make(torch.float64)
    torch.testing.assert_close(ours(*arguments), formula(*arguments), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, arguments)
    gradients = [torch.autograd.grad(f(*arguments).sin().sum(), arguments[:learned]) for f in (ours, formula)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_rounded_once(case: str) -> None:
    """Values stay within half a unit in the last place of the formula in fp64, products of roundings do not."""
    ours, formula, make, learned = CASES[case]
    arguments = tuple(x.detach().requires_grad_(x.requires_grad) for x in make(torch.bfloat16))
    tables = tuple(x.float() for x in turn(torch.float64)) if case == "rotate" else ()
    arguments = (*arguments[:learned], *tables)
    exact = formula(*(x.double() for x in arguments))
    value = ours(*arguments)
    assert value.dtype == torch.bfloat16
    # silu itself is rounded before its product with up
    rounding = 2**-7 if case == "swiglu" else 2**-8
    torch.testing.assert_close(value.double(), exact, rtol=1.01 * rounding, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.float().sum(), arguments[:1])
    (expected,) = torch.autograd.grad(exact.sum(), arguments[:1])
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), expected.float(), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("case", CASES)
def test_a_strided_gradient_is_read_rightly(case: str) -> None:
    ours, formula, make, learned = CASES[case]
    arguments = make(torch.float32)
    gradients = []
    for f in (ours, formula):
        y = f(*arguments).transpose(0, 1)
        gradients.append(torch.autograd.grad(y, arguments[:learned], torch.linspace(-1, 1, y.numel()).view(y.shape)))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_the_norm_is_torch_s() -> None:
    x, weight = torch.randn(3, 7, 16), torch.randn(16)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
