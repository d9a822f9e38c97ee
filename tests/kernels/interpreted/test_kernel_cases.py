"""What the bench times: every way of a case computes the same, and the bench itself runs with Triton's kernels."""

import json
import sys

import pytest
import torch

from kernel_checks import assert_near, exact_inputs, gradients_of, passed
from minka.benchmarks import kernels
from minka.benchmarks.kernel_cases import KernelCase, kernel_cases

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", list(kernel_cases("tiny")), ids=lambda case: f"{case.operation} {case.note}")
def test_ways_agree(case: KernelCase) -> None:
    inputs = case.make(CPU, torch.float32)
    found = {}
    for name in ("torch", "triton"):
        learned = [x.clone().requires_grad_() for x in inputs[: case.learned]]
        outputs = case.ways[name](*learned, *(x.clone() for x in inputs[case.learned :]))
        torch.manual_seed(1)
        gradients = [torch.randn_like(output) for output in outputs]
        found[name] = [*outputs, *(torch.autograd.grad(outputs, learned, gradients) if learned else ())]
    for one, other in zip(found["triton"], found["torch"], strict=True):
        assert_near(one, other.detach(), 1e-5)


@pytest.mark.parametrize(
    "case",
    [case for case in kernel_cases("tiny") if case.operation != "attention" and case.note != "bf16"],
    ids=lambda case: f"{case.operation} {case.note}",
)
def test_a_case_in_half_precision_is_its_definition_in_fp64(case: KernelCase) -> None:
    """As on a GPU, where it is bf16: this finds a test that no right kernel could pass."""
    inputs = case.make(CPU, torch.float16)
    gradients = gradients_of(case, inputs)
    found = passed(case, "triton", inputs, gradients)
    exact = passed(case, "torch", exact_inputs(case, inputs), [g.double() for g in gradients])
    for one, other in zip(found, exact, strict=True):
        assert_near(one, other, 4e-4 if one.dtype == torch.float16 else 1e-4)


def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(sys, "argv", ["kernels", "--tiny", "--json"])
    assert kernels.main() == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert {timing["way"] for timing in timings} == {"torch", "triton"}
    assert {timing["operation"] for timing in timings} == {case.operation for case in kernel_cases("tiny")}
    assert all(timing["ms"] > 0 for timing in timings)
