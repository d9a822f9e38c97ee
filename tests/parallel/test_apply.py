"""How a model is changed for its rank."""

import pytest
import torch

from minka.parallel.apply import recompute


def test_recomputing_a_block_reads_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block draws random numbers."""
    block = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    block(x).square().sum().backward()
    wanted, x.grad = x.grad, torch.zeros_like(x)
    recompute(block)
    monkeypatch.setattr(torch, "get_rng_state", pytest.fail)
    block(x).square().sum().backward()
    assert wanted is not None
    assert torch.equal(wanted, x.grad)
