"""RMS norm in the interpreter, alone and after a residual addition."""

import pytest
import torch
from torch import Tensor

from kernel_checks import assert_near, exact
from minka.kernels.rms_norm import WIDEST, add_rms_norm, rms_norm

HALVES = (torch.float32, torch.float16)
SHAPES = ((1, 1), (7, 123), (127, 8), (129, 64), (5, 4096), (3, 9000), (0, 16))


def formula(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[1]).requires_grad_()
    d_y = torch.randn(shape).to(dtype)
    eps = 1e-5 if shape[1] > 1 else 1.0  # a norm of one number has a gradient by its eps alone
    y = rms_norm(x, weight, eps, "triton")
    inputs = exact(x, weight)
    right = formula(inputs[0], inputs[1], eps)
    assert y.dtype == dtype
    assert_near(y, right)
    expected = torch.autograd.grad(right, inputs, d_y.double())
    for found, one in zip(torch.autograd.grad(y, (x, weight), d_y), expected, strict=True):
        assert_near(found, one)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_after_an_addition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The sum is rounded as torch rounds it, and the norm is that of the rounded sum."""
    x, added = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(shape[1]).requires_grad_()
    d_y, d_total = (torch.randn(shape).to(dtype) for _ in range(2))
    eps = 1e-5 if shape[1] > 1 else 1.0
    y, total = add_rms_norm(x, added, weight, eps, "triton")
    assert torch.equal(total, x + added)
    inputs = exact(x + added, weight)
    right = formula(inputs[0], inputs[1], eps)
    assert_near(y, right)
    d_right, d_weight = torch.autograd.grad((right, inputs[0] * 1), inputs, (d_y.double(), d_total.double()))
    found = torch.autograd.grad((y, total), (x, added, weight), (d_y, d_total))
    for gradient, one in zip(found, (d_right, d_right, d_weight), strict=True):
        assert_near(gradient, one)


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1e4, 1e15])
def test_magnitudes(size: float) -> None:
    x, weight = (torch.randn(9, 40) * size).requires_grad_(), torch.randn(40).requires_grad_()
    inputs = exact(x, weight)
    eps = 1e-5 * size**2
    y, right = rms_norm(x, weight, eps, "triton"), formula(inputs[0], inputs[1], eps)
    assert_near(y, right)
    found, expected = (torch.autograd.grad(f.sum(), i) for f, i in ((y, (x, weight)), (right, inputs)))
    for gradient, one in zip(found, expected, strict=True):
        assert_near(gradient, one)


def test_strides() -> None:
    """Rows of a larger matrix, and a gradient that is transposed."""
    whole, weight = torch.randn(6, 5, 3 * 24), torch.randn(24).requires_grad_()
    x = whole[..., 24:48].requires_grad_()
    d_y = torch.randn(24, 5, 6).transpose(0, 2)
    inputs = exact(x, weight)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-5, "triton"), (x, weight), d_y)
    expected = torch.autograd.grad(formula(inputs[0], inputs[1]), inputs, d_y.double())
    for gradient, one in zip(found, expected, strict=True):
        assert_near(gradient, one)


def test_the_widest_rows_and_none_wider() -> None:
    x, weight = torch.randn(2, WIDEST, requires_grad=True), torch.randn(WIDEST, requires_grad=True)
    inputs = exact(x, weight)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-5, "triton").sum(), (x, weight))
    for gradient, one in zip(found, torch.autograd.grad(formula(inputs[0], inputs[1]).sum(), inputs), strict=True):
        assert_near(gradient, one)
    with pytest.raises(ValueError, match=f"at most {WIDEST} elements, not {WIDEST + 1}"):
        rms_norm(torch.randn(2, WIDEST + 1), torch.randn(WIDEST + 1), 1e-5, "triton")


def test_the_operators_are_torch_operators() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    x, added, weight = (torch.randn(shape, requires_grad=True) for shape in ((4, 6, 16), (4, 6, 16), (16,)))
    torch.library.opcheck(torch.ops.minka.rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.minka.add_rms_norm, (x, added, weight, 1e-5))
