"""AdamW and the squared norm over many tensors, in the interpreter."""

import pytest
import torch
from torch import Tensor

from kernel_checks import error
from minka.kernels.adamw import Box, Coefficients, adamw_
from minka.kernels.choose import Own
from minka.kernels.many_tensors import CHUNK, Chunks
from minka.kernels.squared_norm import squares_of_all

SHAPES = ((1,), (7,), (0,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, 41), (2, 0), (130, 70))
DECAYS = (0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
CPU = torch.device("cpu")
TRUE = torch.tensor(True)


def given(
    size: float = 1.0, weights: torch.dtype = torch.float32, moments: torch.dtype = torch.float32
) -> dict[str, list[Tensor]]:
    """Gradients have the weights' dtype."""
    return {
        "weights": [torch.randn(shape).to(weights) for shape in SHAPES],
        "moments1": [torch.zeros(shape, dtype=moments) for shape in SHAPES],
        "moments2": [torch.zeros(shape, dtype=moments) for shape in SHAPES],
        "gradients": [(torch.randn(shape) * size).to(weights) for shape in SHAPES],
    }


def stepped(
    tensors: dict[str, list[Tensor]], number: int, divisor: float, accept: Tensor = TRUE, how: Own = "triton"
) -> None:
    """Tensor i is a box in the middle of a larger one, with key 7 ** i."""
    chunks = Chunks.of([w.numel() for w in tensors["weights"]], CPU)
    whole = [tuple(3 * size + 5 for size in shape) for shape in SHAPES]
    boxes = [Box.of(7**i, (3,) * len(s), s, w) for i, (s, w) in enumerate(zip(SHAPES, whole, strict=True))]
    coefficients = Coefficients(1e-2, 0.9, 0.999, 1e-8)
    scalars = torch.tensor(float(number)), torch.tensor(divisor), accept
    decays, columns = torch.tensor(DECAYS), torch.tensor(boxes).t().contiguous()
    adamw_(tensors, chunks, decays, columns, *scalars, coefficients, how)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_adamw_is_that_of_torch(size: float) -> None:
    """Five steps against torch's own in fp64, of the same gradients divided beforehand."""
    tensors = given(size)
    start = [w.clone() for w in tensors["weights"]]
    exact = [torch.nn.Parameter(w.double()) for w in start]
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(exact, DECAYS, strict=True)]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for number in range(1, 6):
        tensors["gradients"] = [torch.randn(shape) * size for shape in SHAPES]
        for w, g in zip(exact, tensors["gradients"], strict=True):
            w.grad = g.double() / 3.0
        peer.step()
        stepped(tensors, number, 3.0)
    for index, w in enumerate(exact):
        if not w.numel():
            continue
        assert error(tensors["weights"][index], w.detach()) <= 1e-6
        change = tensors["weights"][index] - start[index]
        assert size == 1e-15 or error(change, w.detach() - start[index].double()) <= 1e-4  # of rounded weights
        assert error(tensors["moments1"][index], peer.state[w]["exp_avg"]) <= 1e-5
        assert size == 1e-15 or error(tensors["moments2"][index], peer.state[w]["exp_avg_sq"]) <= 1e-5


HALF = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("moments", HALF)
@pytest.mark.parametrize("weights", HALF)
def test_what_is_stored_in_bf16_is_that_of_the_definition_to_the_bit(
    weights: torch.dtype, moments: torch.dtype
) -> None:
    """fp32 to rounding: torch's square root is not numpy's."""
    by_kernel = given(1.0, weights, moments)
    by_definition = {name: [tensor.clone() for tensor in some] for name, some in by_kernel.items()}
    for number in range(1, 4):
        stepped(by_kernel, number, 3.0)
        stepped(by_definition, number, 3.0, how="torch")
    for name, some in by_kernel.items():
        for found, right in zip(some, by_definition[name], strict=True):
            if found.dtype == torch.bfloat16:
                assert torch.equal(found, right), name
            else:
                assert error(found, right) <= 1e-6, name


@pytest.mark.parametrize("half", [False, True])
def test_a_refused_step_changes_no_bit(half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    tensors = given(1.0, dtype, dtype)
    tensors["gradients"][4][0] = float("nan")
    before = {name: [t.clone() for t in some] for name, some in tensors.items()}
    stepped(tensors, 1, 1.0, torch.tensor(False))
    for name in ("weights", "moments1", "moments2"):
        assert all(torch.equal(one, other) for one, other in zip(tensors[name], before[name], strict=True))


def test_the_squared_norm_is_that_of_fp64() -> None:
    tensors = [torch.randn(shape) * 10.0**index for index, shape in enumerate(SHAPES)]
    factors = torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    chunks = Chunks.of([t.numel() for t in tensors], CPU)
    found = squares_of_all(tensors, factors, chunks)
    right = sum(factor * t.double().square().sum() for factor, t in zip(factors, tensors, strict=True))
    assert found.dtype == torch.float64
    assert abs(float(found / right) - 1) <= 1e-6
    tensors[6][1, 1] = float("inf")
    assert not squares_of_all(tensors, factors, chunks).isfinite()


def test_the_squared_norm_of_bf16_is_summed_in_fp32() -> None:
    tensors = [torch.randn(shape).bfloat16() for shape in SHAPES]
    found = squares_of_all(
        tensors, torch.ones(len(SHAPES), dtype=torch.float64), Chunks.of([t.numel() for t in tensors], CPU)
    )
    assert float(found) == pytest.approx(sum(float(t.double().square().sum()) for t in tensors), rel=1e-6)


def test_no_tensors_at_all() -> None:
    empty = [torch.zeros(0)]
    assert squares_of_all(empty, torch.ones(1, dtype=torch.float64), Chunks.of([0], CPU)) == 0


def test_what_is_not_taken_is_refused_by_name() -> None:
    gaps = [torch.zeros(4, 4).t()[:, :2]]
    factors = torch.ones(1, dtype=torch.float64)
    mixed = [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4)]
    with pytest.raises(ValueError, match="all in fp32 or all in bf16, not in bfloat16 and float32"):
        squares_of_all(mixed, factors.expand(2), Chunks.of([4, 4], CPU))
    with pytest.raises(ValueError, match="squared_norm's tensors are all in fp32 or all in bf16, not in float16"):
        squares_of_all([torch.zeros(4, dtype=torch.float16)], factors, Chunks.of([4], CPU))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) has more than two dimensions"):
        Box.of(0, (0, 0, 0), (2, 3, 4), (2, 3, 4))
    with pytest.raises(ValueError, match=r"shape \(4, 2\) has gaps"):
        squares_of_all(gaps, factors, Chunks.of([8], CPU))


def test_the_operators_are_torch_operators() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    some = [[torch.rand(5), torch.rand(3, 2)] for _ in range(4)]
    chunks = Chunks.of([5, 6], CPU)
    torch.library.opcheck(torch.ops.minka.squared_norm, (some[0], torch.ones(2, dtype=torch.float64), *chunks))
    scalars, boxes = (torch.tensor(1.0), torch.tensor(2.0), TRUE), torch.ones(4, 2, dtype=torch.int64)
    rest = torch.ones(2), boxes, *scalars, 0.1, 0.9, 0.99, 1e-8
    torch.library.opcheck(torch.ops.minka.adamw_, (*some, *chunks, *rest))
    halves = [[tensor.bfloat16() for tensor in tensors] for tensors in some]
    torch.library.opcheck(torch.ops.minka.adamw_, (*halves, *chunks, *rest))
