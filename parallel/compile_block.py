"""Blocks under torch.compile in the passes that train; passes without gradients run them as they are."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from minka.model.transformer import Block

# Graphs of one block's code, which all blocks share. Torch's limit of 8 is below what a run needs: the first block has
# nothing to add and the others have, a micro-batch has one document a row or several, and sizes are taken as constants
# at first, then as variables, apart from 1. Past the limit torch runs a block as it is, or ends a run of whole graphs.
MOST_GRAPHS = 64


def compile_block(block: Block, *, full_graph: bool) -> None:
    """Compile what a block computes where gradients are wanted.

    Evaluation, samples and the probe have sizes and a grad mode of their own: each would be a graph, and half a minute,
    for few passes. Their results then do not depend on kernels.compile either.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_news)
    forward: Callable[..., Any] = block.forward
    compiled = torch.compile(forward, fullgraph=full_graph)

    @wraps(forward)
    def called(*args: Any) -> Any:
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    block.forward = called  # type: ignore[method-assign,assignment]


def _is_news(record: logging.LogRecord) -> bool:
    """False for torch's advice against operations in place under selective recomputation: a block has none."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
