"""How a model is changed for its rank."""

import pytest
import torch

from minka.parallel.apply import recompute


def test_recomputing_a_block_reads_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block draws random numbers."""

    class Block(torch.nn.Linear):
        def forward(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x if added is None else x + added)

    block = Block(3, 3)
    x, added = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    block(x, added).square().sum().backward()
    wanted, x.grad = x.grad, torch.zeros_like(x)
    recompute(block)
    monkeypatch.setattr(torch, "get_rng_state", pytest.fail)
    block(x, added).square().sum().backward()
    assert wanted is not None
    assert torch.equal(wanted, x.grad)
