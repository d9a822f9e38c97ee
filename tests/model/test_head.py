"""The chunked head is plain cross entropy plus z-loss, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minka.kernels.cross_entropy import IGNORED
from minka.model.head import Head, HeadSums
from minka.plan import execution_choices

D, V = 24, 337
Z = 1e-2  # large, so that a fault in it shows


def make_head(tied: bool = False, dtype: torch.dtype = torch.float32) -> Head:
    embedding = nn.Embedding(V, D) if tied else None
    head = Head(D, V, Z, embedding)
    nn.init.normal_(head.matrix(), std=0.3)
    return head.to(dtype) if embedding is None else head


def batch(rows: int, dtype: torch.dtype = torch.float32, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(2, rows, D, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (2, rows)).masked_fill(torch.rand(2, rows) < ignored, IGNORED)
    return hidden, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: loss sum and weighted z-loss sum, in the dtype of the inputs."""
    logits = hidden.flatten(0, 1) @ weight.t()
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    z = Z * (logits.logsumexp(1).square() * (targets.flatten() != IGNORED)).sum()
    return loss, z


@pytest.mark.parametrize("rows", [1, 7, 300])  # within a chunk, and over two with a rest
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_z_loss_and_gradients_are_the_definition_s(rows: int, dtype: torch.dtype) -> None:
    head = make_head(dtype=dtype)
    hidden, targets = batch(rows, dtype)
    sums = head(hidden, targets)
    (sums.objective / 7).backward()
    mine = hidden.grad, head.matrix().grad
    hidden.grad = head.matrix().grad = None
    loss, z = plain(hidden, head.matrix(), targets)
    ((loss + z) / 7).backward()
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-12, 1e-13)
    torch.testing.assert_close((sums.loss, sums.z_loss), (loss.detach(), z.detach()), rtol=rtol, atol=atol)
    torch.testing.assert_close(mine, (hidden.grad, head.matrix().grad), rtol=rtol, atol=atol)


def test_only_the_objective_has_a_gradient_and_it_is_the_sum_of_both() -> None:
    sums: HeadSums = make_head()(*batch(9))
    assert [value.requires_grad for value in sums] == [True, False, False]
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in sums)
    torch.testing.assert_close(sums.objective.detach(), sums.loss + sums.z_loss)
    assert sums.z_loss > 0


def test_far_apart_logits_neither_overflow_nor_lose_the_loss() -> None:
    head = make_head()
    hidden, targets = batch(50, ignored=0)
    with torch.no_grad():
        hidden.mul_(300)
    sums = head(hidden, targets)
    sums.objective.backward()
    loss, _ = plain(hidden.double(), head.matrix().double(), targets)
    assert loss > 1e4  # probabilities of targets vanish in fp32
    torch.testing.assert_close(sums.loss.double(), loss, rtol=1e-5, atol=0)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_targets_all_ignored_give_zeros() -> None:
    head = make_head()
    hidden, targets = batch(20)
    sums = head(hidden, torch.full_like(targets, IGNORED))
    sums.objective.backward()
    assert [value.item() for value in sums] == [0, 0, 0]
    for gradient in (hidden.grad, head.matrix().grad):
        assert gradient is not None
        assert not gradient.any()


def test_losses_of_single_tokens_are_the_definition_s() -> None:
    head = make_head()
    hidden, targets = batch(300)
    losses = head(hidden, targets, reduce=False)
    expected = F.cross_entropy(
        head.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    assert losses.shape == targets.shape
    assert not losses.requires_grad
    assert not losses[targets == IGNORED].any()
    torch.testing.assert_close(losses.flatten(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_tied_head_owns_nothing_and_sends_its_gradient_to_the_embedding() -> None:
    head = make_head(tied=True)
    assert not list(head.parameters())
    assert not head.state_dict()
    hidden, targets = batch(30)
    head(hidden, targets).objective.backward()
    mine = head.matrix().grad
    head.matrix().grad = None
    sum(plain(hidden, head.matrix(), targets)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(mine, head.matrix().grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    head = make_head()
    hidden, targets = batch(30)
    head(hidden, targets).objective.backward()
    both = {"hidden": hidden.grad, "weight": head.weight.grad}
    hidden.grad = head.weight.grad = None
    (hidden if frozen == "hidden" else head.weight).requires_grad_(False)
    head(hidden, targets).objective.backward()
    one = {"hidden": hidden.grad, "weight": head.weight.grad}
    assert one.pop(frozen) is None
    ((name, gradient),) = one.items()
    assert torch.equal(gradient, both[name])  # type: ignore[arg-type]


def test_bf16_is_as_near_to_the_truth_as_torch_and_sums_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is torch's own error in bf16; 32 chunks, since sums over chunks in bf16 would fail it."""
    monkeypatch.setattr(execution_choices, "CPU_ROWS", 16)
    head = make_head(dtype=torch.bfloat16)
    hidden, targets = batch(256, torch.bfloat16)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (hidden, head.weight))

    truth = gradients(sum(plain(hidden.double(), head.weight.double(), targets)))  # type: ignore[arg-type]
    logits = (hidden.flatten(0, 1) @ head.weight.t()).float()
    torch_loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    torch_loss = torch_loss + Z * (logits.logsumexp(1).square() * (targets.flatten() != IGNORED)).sum()
    theirs, ours = gradients(torch_loss), gradients(head(hidden, targets).objective)
    for true, their, our in zip(truth, theirs, ours, strict=True):
        assert our.dtype == torch.bfloat16
        scale = true.double().norm()
        assert (our.double() - true).norm() / scale <= 1.3 * (their.double() - true).norm() / scale
    assert head(hidden, targets).loss.dtype == torch.float32


def test_the_sum_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    hidden, targets = batch(100)
    whole = head(hidden, targets)
    whole.objective.backward()
    gradient = head.weight.grad
    head.weight.grad = None
    monkeypatch.setattr(execution_choices, "CPU_ROWS", 33)
    cut = head(hidden, targets)
    cut.objective.backward()
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(head.weight.grad, gradient, rtol=1e-5, atol=1e-6)
