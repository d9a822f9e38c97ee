"""Blocks whose activations are computed again in backward."""

from typing import Any, Literal

import pytest
import torch

from minka.model.attention import document_structure
from minka.model.rope_table import rope_table
from minka.model.transformer import Block
from minka.parallel.memory_trace import MemoryTrace
from minka.parallel.recompute import recompute
from minka.plan.config_sections import ModelSection

What = Literal["block", "selective"]
CFG = ModelSection(layers=1, d_model=32, heads=4, kv_heads=2, head_dim=8, d_ff=80, vocab=256, qk_norm=True)
ROWS, TOKENS = 2, 24


def passed(what: What | None, trace: MemoryTrace | None = None) -> list[Any]:
    """Outputs and gradients of one block, after a block before it."""
    torch.manual_seed(0)
    block: Any = Block(CFG)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    if what is not None:
        recompute(block, what)
    x, added = (torch.randn(ROWS, TOKENS, 32).requires_grad_() for _ in range(2))
    documents = torch.arange(TOKENS).expand(ROWS, TOKENS) // 10
    structure = document_structure(documents, varlen=False).to(x.device, x.dtype)
    table = rope_table(documents, CFG)
    assert structure.mask is not None
    if trace is None:
        outputs = block(x, added, table, structure)
    else:
        trace.watch("weights", block.parameters())
        trace.watch("workspace", [x, added, table.cos, table.sin, structure.mask])
        with trace:
            outputs = block(x, added, table, structure)
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, *(leaf.grad for leaf in (x, added, *block.parameters()))]


@pytest.mark.parametrize("what", ["block", "selective"])
def test_no_bit_changes(what: What) -> None:
    for one, other in zip(passed(what), passed(None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["block", "selective"])
def test_no_random_state_is_read(what: What, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block draws random numbers."""
    monkeypatch.setattr(torch, "get_rng_state", pytest.fail)
    passed(what)


def test_what_is_kept() -> None:
    """A block keeps its input; selective recomputation also all products but the last, and attention's results."""
    kept = {what: _activations(what) for what in ("block", "selective")}
    tokens, d, q, kv, ff = ROWS * TOKENS, CFG.d_model, 4 * 8, 2 * 8, CFG.d_ff
    log_sums = tokens * CFG.heads
    assert kept["selective"] - kept["block"] == 4 * (tokens * (q + 2 * kv + q + d + 2 * ff) + log_sums)


def _activations(what: What) -> int:
    trace = MemoryTrace()
    passed(what, trace)
    return trace.peak().largest["activations"]
