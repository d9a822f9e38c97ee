"""AdamW on local tensors is torch's AdamW; a refused step changes no bit; update norms are those of the real update."""

import pytest
import torch

from minka.parallel.pieces import piece_of
from minka.plan.config_sections import OptimizerSection
from minka.train.optimizer import AdamW

SETTINGS = OptimizerSection(learning_rate=1e-2, weight_decay=0.1)
ACCEPT, REFUSE = torch.tensor(True), torch.tensor(False)


def weights() -> dict[str, torch.Tensor]:
    """One of each kind: embedding, matrix, norm, and an empty piece of a rank that has no rows."""
    return {
        "embedding.weight": torch.randn(11, 5),
        "blocks.0.mlp.up.weight": torch.randn(7, 5),
        "norm.weight": torch.randn(5),
        "blocks.0.attention.wq.weight": torch.randn(0, 5),
    }


def optimizer(tensors: dict[str, torch.Tensor], settings: OptimizerSection = SETTINGS) -> AdamW:
    return AdamW({name: piece_of(tensor) for name, tensor in tensors.items()}, settings)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_steps_are_bitwise_those_of_torch(decay_embeddings: bool) -> None:
    ours = weights()
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in ours.items() if tensor.numel()}
    decayed = {"blocks.0.mlp.up.weight"} | ({"embedding.weight"} if decay_embeddings else set())
    groups = [
        {"params": [theirs[n] for n in theirs if n in decayed], "weight_decay": 0.1},
        {"params": [theirs[n] for n in theirs if n not in decayed], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    mine = optimizer(ours, SETTINGS.model_copy(update={"decay_embeddings": decay_embeddings}))
    for _ in range(5):
        gradients = {name: torch.randn_like(tensor) for name, tensor in ours.items()}
        for name, tensor in theirs.items():
            tensor.grad = gradients[name] / 4
        reference.step()
        mine.step(gradients, 1e-2, torch.tensor(4.0), ACCEPT)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_refused_step_changes_no_bit_and_is_not_counted() -> None:
    tensors = weights()
    mine = optimizer(tensors)
    mine.step({n: torch.randn_like(t) for n, t in tensors.items()}, 1e-2, torch.tensor(1.0), ACCEPT)
    before = {name: tensor.clone() for name, tensor in (tensors | flat(mine)).items()}
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    mine.step(broken, 1e-2, torch.tensor(float("nan")), REFUSE)
    for name, tensor in (tensors | flat(mine)).items():
        assert torch.equal(before[name], tensor), name
    assert mine.count().item() == 1


def test_update_norms_are_those_of_the_step_taken() -> None:
    tensors = weights()
    mine = optimizer(tensors)
    for _ in range(3):
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        mine.step({n: torch.randn_like(t) for n, t in tensors.items()}, 1e-3, torch.tensor(1.0), ACCEPT)
    for name, square in mine.update_squares(1e-3).items():
        taken = (before[name] - tensors[name]).double().square().sum()
        assert float(square) == pytest.approx(float(taken), rel=1e-3), name


def flat(mine: AdamW) -> dict[str, torch.Tensor]:
    """The moments by name."""
    return {f"{kind}.{name}": tensor for kind, by in mine.state().items() for name, tensor in by.items()}
