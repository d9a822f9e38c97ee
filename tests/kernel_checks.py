"""Errors of kernels against the same formula in fp64."""

from typing import Any

import torch
from torch import Tensor

from minka.benchmarks.kernel_cases import KernelCase

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


def passed(case: KernelCase, way: str, inputs: tuple[Tensor, ...], gradients: list[Tensor]) -> list[Tensor]:
    """Outputs of a way, then gradients of what is learned."""
    learned = [x.clone().requires_grad_() for x in inputs[: case.learned]]
    outputs = case.ways[way](*learned, *(x.clone() for x in inputs[case.learned :]))
    found = torch.autograd.grad(outputs, learned, gradients) if learned else ()
    return [*(output.detach() for output in outputs), *found]


def gradients_of(case: KernelCase, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Random gradients of the outputs."""
    with torch.no_grad():
        return [torch.randn_like(x) for x in case.ways["torch"](*(x.clone() for x in inputs))]


def exact_inputs(case: KernelCase, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In fp64. A norm after an addition is that of the sum as it is kept: rounded."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    if case.operation != "rms_norm":
        return wide
    x, added, *rest = wide
    return (x + added).to(inputs[0].dtype).double(), torch.zeros_like(added), *rest
