"""A block of the model with Triton's kernels under torch.compile."""

import torch

from kernel_checks import error
from minka.kernels.choose import Kernels
from minka.model.attention import document_structure
from minka.model.rope_table import rope_table
from minka.model.transformer import Block
from minka.plan.config_sections import ModelSection

CFG = ModelSection(layers=1, d_model=16, heads=4, kv_heads=2, head_dim=4, d_ff=24, vocab=256, qk_norm=True)
TRITON = Kernels(rms_norm="triton", rope="triton", swiglu="triton", cross_entropy="triton")


def test_a_block_is_one_graph() -> None:
    """fullgraph=True raises at a break; values and gradients are those of the block that is not compiled."""
    torch.use_deterministic_algorithms(False)  # Inductor's own buffers are not what this tests
    block = Block(CFG, TRITON)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    structure = document_structure(documents, varlen=False).to(torch.device("cpu"), torch.float32)
    table = rope_table(torch.tensor([[0, 1, 2, 0, 1, 2]]), CFG)
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x, added = (torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
        block.zero_grad()
        total, more = call(x, added, table, structure)
        (total.square().sum() + more.sin().sum()).backward()
        found.append([total, more, x.grad, added.grad, *(weight.grad for weight in block.parameters())])
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-6
