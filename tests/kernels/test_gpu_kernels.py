"""Kernels on a GPU, in bf16, at sizes that the interpreter has no time for. `make gpu-check`."""

from typing import Any

import pytest
import torch

from kernel_checks import assert_near, exact_inputs, gradients_of, passed
from minka.benchmarks.kernel_cases import KernelCase, kernel_cases
from minka.kernels.attention_spans import document_spans
from minka.kernels.flash_attention import attention_definition, flash_attention
from minka.kernels.rms_norm import rms_norm
from minka.kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CUDA = torch.device("cuda")
ONE_ROUNDING, ATTENTION, ATTENTION_GRADIENTS = 2.2e-3, 3e-3, 4e-3  # of bf16, relative, in Frobenius norm


@pytest.mark.parametrize(
    "case",
    [case for case in kernel_cases("middle") if case.operation != "attention" and case.note != "bf16"],
    ids=lambda case: f"{case.operation} {case.width} {case.note}",
)
def test_an_operation_is_its_definition_in_fp64(case: KernelCase) -> None:
    """Twice, to the bit. fp64 takes the definition, whatever it is called with."""
    inputs = case.make(CUDA, torch.bfloat16)
    gradients = gradients_of(case, inputs)
    found = passed(case, "triton", inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, passed(case, "triton", inputs, gradients), strict=True))
    exact = passed(case, "torch", exact_inputs(case, inputs), [g.double() for g in gradients])
    for one, other in zip(found, exact, strict=True):
        assert_near(one, other, ONE_ROUNDING if one.dtype == torch.bfloat16 else 1e-4)


def test_what_adamw_stores_in_bf16_is_that_of_its_definition() -> None:
    """A multiplication and an addition that are fused on one side may round a number the other way: very few."""
    (case,) = (case for case in kernel_cases("middle") if (case.operation, case.note) == ("adamw", "bf16"))
    inputs = case.make(CUDA, torch.bfloat16)
    found = [passed(case, way, inputs, []) for way in ("triton", "triton", "torch")]
    for one, again, defined in zip(*found, strict=True):
        assert torch.equal(one, again)
        assert float((one != defined).double().mean()) <= 1e-3


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_attention(width: int, groups: int) -> None:
    lengths = torch.tensor([1, 700, 129, 1, 64, 500, 0, 0])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(CUDA, torch.int32)
    total = int(lengths.sum())
    shapes = (total, 8, width), (total, groups, width), (total, groups, width)
    inputs: Any = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    between, d_y = document_spans(starts, starts, total, total), torch.randn(total, 8, width, device=CUDA).bfloat16()
    runs = []
    for _ in range(2):
        y, _ = flash_attention(inputs[0], inputs[1], inputs[2], between)
        runs.append([y, *torch.autograd.grad(y, inputs, d_y)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    wide: Any = [x.detach().double().requires_grad_() for x in inputs]
    right, _ = attention_definition(wide[0], wide[1], wide[2], between)
    assert_near(runs[0][0], right.detach(), ATTENTION)
    for one, other in zip(runs[0][1:], torch.autograd.grad(right, wide, d_y.double()), strict=True):
        assert_near(one, other, ATTENTION_GRADIENTS)


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("way", ["torch", "varlen", "flex"])
def test_every_provider_of_attention_agrees(way: str, documents: int) -> None:
    """torch's kernels among themselves and with ours, of one document a row and of several, with gradients."""
    (case,) = (c for c in kernel_cases("middle") if (c.operation, c.width) == ("attention", 128)
               and c.note.startswith("one" if documents == 1 else str(documents)))  # fmt: skip
    inputs = case.make(CUDA, torch.bfloat16)
    gradients = gradients_of(case, inputs)
    for one, other in zip(passed(case, way, inputs, gradients), passed(case, "triton", inputs, gradients), strict=True):
        assert_near(one, other.double(), 2 * ATTENTION_GRADIENTS)


def test_more_than_2_31_elements() -> None:
    """The last rows are right: no offset wraps around."""
    width = 8192
    rows = 2**31 // width + 16
    x = torch.zeros(rows, width, device=CUDA, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, width, device=CUDA).bfloat16()
    weight = torch.randn(width, device=CUDA)
    last = x[-3:].double()
    with torch.no_grad():
        y = rms_norm(x, weight, 1e-5, "triton")[-3:]
        assert_near(y, last * torch.rsqrt(last.square().mean(-1, keepdim=True) + 1e-5) * weight, ONE_ROUNDING)
        z = swiglu(x, x, "triton")[-3:]
        assert_near(z, last * torch.sigmoid(last) * last, ONE_ROUNDING)
