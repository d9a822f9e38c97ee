"""SwiGLU in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

from kernel_checks import assert_near, exact
from minka.kernels.swiglu import swiglu

HALVES = (torch.float32, torch.float16)
SHAPES = ((1, 1), (7, 123), (127, 8), (129, 32), (2, 4096), (0, 16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype, size: float) -> None:
    gate, up = ((torch.randn(shape) * size).to(dtype).requires_grad_() for _ in range(2))
    y = swiglu(gate, up, "triton")
    d_y = torch.randn(shape).to(dtype)
    wide_gate, wide_up = exact(gate, up)
    formula = F.silu(wide_gate) * wide_up
    assert_near(y, formula)
    expected = torch.autograd.grad(formula, (wide_gate, wide_up), d_y.double())
    for found, right in zip(torch.autograd.grad(y, (gate, up), d_y), expected, strict=True):
        assert_near(found, right)


def test_strides() -> None:
    """Gate and up as halves of one product, and a gradient that is transposed."""
    both = torch.randn(5, 6, 2 * 24, requires_grad=True)
    wide_both = both.detach().double().requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    wide_gate, wide_up = wide_both.chunk(2, dim=-1)
    d_y = torch.randn(24, 6, 5).transpose(0, 2)
    (found,) = torch.autograd.grad(swiglu(gate, up, "triton"), both, d_y)
    (right,) = torch.autograd.grad(F.silu(wide_gate) * wide_up, wide_both, d_y.double())
    assert_near(found, right)


def test_the_operator_is_a_torch_operator() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    gate, up = (torch.randn(4, 6, 16, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.minka.swiglu, (gate, up))
