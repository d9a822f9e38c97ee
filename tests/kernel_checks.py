"""Errors of kernels against the same formula in fp64."""

from typing import Any

import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.2e-3}  # of the relative Frobenius error


def error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; 0 where both are all zero."""
    assert found.shape == exact.shape, f"expected shape {tuple(exact.shape)}, found {tuple(found.shape)}"
    assert bool(found.isfinite().all()), "not finite"
    distance, size = (found.detach().double() - exact.double()).norm(), exact.double().norm()
    return 0.0 if distance == 0 else float(distance / size)


def assert_near(found: Tensor, exact: Tensor, bound: float | None = None) -> None:
    """The relative Frobenius error is within the bound of found's dtype, or within `bound`."""
    found_error = error(found, exact)
    allowed = BOUNDS[found.dtype] if bound is None else bound
    assert found_error <= allowed, f"relative error {found_error:.2e}, allowed {allowed:.2e}, in {found.dtype}"


def exact(*tensors: Tensor) -> Any:
    """Copies in fp64, which require gradients; a tuple."""
    return tuple(t.detach().double().requires_grad_() for t in tensors)
