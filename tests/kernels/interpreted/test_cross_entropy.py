"""Cross-entropy in the interpreter: losses, gradients and hits, of a whole vocabulary and of one that is cut."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernel_checks import assert_near, exact
from minka.kernels.cross_entropy import ALL_ROWS, IGNORED, How, VocabShard, cross_entropy_, row_block
from minka.kernels.linear_cross_entropy import linear_cross_entropy, token_losses

HALVES = (torch.float32, torch.float16)
SHAPES = ((1, 2), (7, 127), (129, 2), (3, 32000), (5, 4097), (0, 9))


def formula(logits: Tensor, targets: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    counts = targets != IGNORED
    log_total = logits.logsumexp(dim=1)
    loss = log_total - logits.gather(1, targets.where(counts, 0)[:, None])[:, 0]
    return loss.where(counts, 0), (z_weight * log_total.square()).where(counts, 0)


def given(tokens: int, vocab: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(tokens, vocab) * size).to(dtype)
    targets = torch.randint(vocab, (tokens,)).where(torch.rand(tokens) > 0.2, IGNORED)
    return logits, targets


def check(logits: Tensor, targets: Tensor, z_weight: float) -> None:
    (wide,) = exact(logits)
    loss, z_loss = formula(wide, targets, z_weight)
    (gradient,) = torch.autograd.grad((loss + z_loss).sum(), wide)
    expected = wide.argmax(dim=1) == targets
    found = cross_entropy_(logits, targets, z_weight, ALL_ROWS, gradient=True, hits=True, how="triton")
    assert found.loss.dtype == torch.float32
    assert_near(found.loss, loss)
    assert_near(found.z_loss, z_loss)
    assert_near(logits, gradient)  # written over them
    assert found.hit is not None
    assert torch.equal(found.hit, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_whole_vocabulary(shape: tuple[int, int], dtype: torch.dtype, z_weight: float) -> None:
    check(*given(*shape, dtype), z_weight)


@pytest.mark.parametrize("size", [1e-4, 1e3, 1e6])
def test_magnitudes(size: float) -> None:
    check(*given(6, 50, torch.float32, size), 0.0)


def test_the_first_of_equals_is_the_hit_however_far_the_other_is() -> None:
    width = 5000
    block, _ = row_block(width)
    logits, _ = given(2, width, torch.float32)
    logits[:, 3] = logits[:, block + 5] = 50.0  # in two blocks
    targets = torch.tensor([3, block + 5])
    found = cross_entropy_(logits, targets, 0.0, ALL_ROWS, gradient=False, hits=True, how="triton")
    assert found.hit is not None
    assert found.hit.tolist() == [True, False]


def test_large_logits_cancel_before_they_are_rounded() -> None:
    logits, targets = given(6, 50, torch.float32)
    logits += 3e3
    (wide,) = exact(logits)
    loss, _ = formula(wide, targets, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    found = cross_entropy_(logits, targets, 0.0, ALL_ROWS, gradient=True, hits=False, how="triton")
    assert_near(found.loss, loss, 1e-6)
    assert_near(logits, gradient, 1e-6)


def test_targets_with_gaps_and_logits_in_fp64() -> None:
    logits, targets = given(12, 30, torch.float32)
    right = formula(logits[:6].double(), targets[::2], 0.0)[0]
    found = cross_entropy_(logits[:6], targets[::2], 0.0, ALL_ROWS, gradient=False, hits=False, how="triton")
    assert_near(found.loss, right)
    with pytest.raises(ValueError, match=r"fp32, fp16 or bf16, not in torch\.float64"):
        cross_entropy_(logits.double(), targets, 0.0, ALL_ROWS, gradient=False, hits=False, how="triton")


def test_all_ignored() -> None:
    logits, _ = given(4, 30, torch.float32)
    logits[0] = float("inf")  # what does not count may be anything
    found = cross_entropy_(logits, torch.full((4,), IGNORED), 0.1, ALL_ROWS, gradient=True, hits=False, how="triton")
    assert not found.loss.any()
    assert not found.z_loss.any()
    assert not logits.any()


def test_without_a_gradient_and_with_strides() -> None:
    """Rows of a larger buffer, and equal largest logits: the first one is the hit."""
    whole, targets = torch.randn(5, 64), torch.tensor([3, 0, IGNORED, 31, 7])
    logits = whole[:, :32]
    logits[0, 9] = logits[0, 3] = 10.0
    logits[4, 7] = logits[4, 2] = 10.0
    right = formula(logits.double(), targets, 0.0)[0]
    found = cross_entropy_(logits, targets, 0.0, ALL_ROWS, gradient=False, hits=True, how="triton")
    assert_near(found.loss, right)
    assert found.hit is not None
    assert found.hit.tolist()[0] is True
    assert found.hit.tolist()[4] is False
    with pytest.raises(ValueError, match="columns of logits must be next to each other"):
        cross_entropy_(torch.randn(4, 4).t(), targets[:4], 0.0, ALL_ROWS, gradient=False, hits=False, how="triton")


class Ranks:
    """Reductions over ranks that run one after the other, again and again.

    Each turn knows the results of one reduction more, from what all ranks gave in the turn before.
    """

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []  # by rank, what it gave to each reduction
        self.now: list[list[Tensor]] = []

    def next_turn(self) -> None:
        self.before, self.now = self.now, []

    def shard(self, first: int) -> VocabShard:
        self.now.append([])
        given = self.now[-1]

        def reduced(mine: Tensor, together: Callable[[Tensor], Tensor]) -> None:
            given.append(mine.clone())
            if self.before:
                mine.copy_(together(torch.stack([rank[len(given) - 1] for rank in self.before])))

        return VocabShard(first, lambda x: reduced(x, lambda a: a.amax(0)), lambda x: reduced(x, lambda a: a.sum(0)))


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_vocabulary_that_is_cut(dtype: torch.dtype, how: How) -> None:
    ways, columns, z_weight = 3, 40, 1e-2
    logits, targets = given(9, ways * columns, dtype)
    logits[1, 5] = logits[1, 100] = 20.0  # on two ranks
    targets[1] = 5
    (wide,) = exact(logits)
    loss, z_loss = formula(wide, targets, z_weight)
    (gradient,) = torch.autograd.grad((loss + z_loss).sum(), wide)
    ranks = Ranks()
    for _ in range(4):  # three reductions
        ranks.next_turn()
        parts = [part.clone() for part in logits.chunk(ways, dim=1)]
        found = [
            cross_entropy_(part, targets, z_weight, ranks.shard(rank * columns), gradient=True, hits=True, how=how)
            for rank, part in enumerate(parts)
        ]
    for losses, part, right in zip(found, parts, gradient.chunk(ways, dim=1), strict=True):
        assert_near(losses.loss, loss, 1e-5)
        assert_near(losses.z_loss, z_loss, 1e-5)
        assert_near(part, right)
        assert losses.hit is not None
        assert torch.equal(losses.hit, wide.argmax(dim=1) == targets)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_and_loss(dtype: torch.dtype) -> None:
    """Chunks that do not divide the tokens, with the gradients of hidden states and matrix."""
    hidden, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((23, 16), (60, 16)))
    _, targets = given(23, 60, dtype)
    objective, loss, z_loss = linear_cross_entropy(hidden, weight, targets, 1e-3, 5, how="triton")
    wide = exact(hidden, weight)
    right, right_z = formula(wide[0] @ wide[1].t(), targets, 1e-3)
    expected = torch.autograd.grad((right + right_z).sum(), wide)
    bound = 1e-5 if dtype == torch.float32 else 1.5e-3  # of logits that are rounded to the dtype
    assert_near(loss, right.sum(), bound)
    assert_near(z_loss, right_z.sum(), bound)
    for one, other in zip(torch.autograd.grad(objective, (hidden, weight)), expected, strict=True):
        assert_near(one, other, bound)
    losses = token_losses(hidden, weight, targets, 5, how="triton", hits=True)
    assert_near(losses.loss, right, bound)
    assert losses.hit is not None
    assert torch.equal(losses.hit, (hidden @ weight.t()).argmax(dim=1) == targets)


def test_the_operators_are_torch_operators() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs that are not written yet
    logits, targets = given(4, 12, torch.float32)
    statistics = torch.ops.minka.row_statistics(logits, targets, True)
    torch.library.opcheck(torch.ops.minka.cross_entropy_, (logits.clone(), targets, 0.1, True, True))
    torch.library.opcheck(torch.ops.minka.row_statistics, (logits.clone(), targets, True))
    arguments = (logits.clone(), targets, targets >= 0, statistics[0], statistics[1], 0.1)
    torch.library.opcheck(torch.ops.minka.logit_gradient_, arguments)
