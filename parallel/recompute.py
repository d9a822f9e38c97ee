"""Activations that are not kept: a block's forward runs again in backward (Chen et al. 2016), whole or in part."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minka.model.transformer import Block

# Dear to compute again for what they hold: matrix products and attention, under the names of all its implementations.
KEPT = frozenset(
    """
    aten::mm aten::addmm aten::_scaled_mm aten::_scaled_dot_product_flash_attention
    aten::_scaled_dot_product_flash_attention_for_cpu aten::_scaled_dot_product_efficient_attention
    aten::_scaled_dot_product_cudnn_attention aten::_scaled_dot_product_fused_attention_overrideable
    aten::_flash_attention_forward torch_attn::_varlen_attn minka::flash_attention
    flash_attn::_flash_attn_varlen_forward flash_attn_3::fwd
    """.split()
)


SCATTERED = "_c10d_functional::reduce_scatter_tensor"


def recompute(
    block: Block, what: Literal["block", "selective"] = "block", policy: "SelectivePolicy | None" = None
) -> None:
    """Keep only the block's input for backward, and with "selective" its matrix products and attention's output.

    The instance's forward is replaced; a module around it would change parameter names. `policy` is one for all blocks
    of a rank: torch.compile makes a graph for each that it meets.
    """
    forward: Callable[..., Any] = block.forward
    # Nothing in a block draws random numbers, so there is no state to go back to.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        policy = policy or SelectivePolicy()
        forward = policy.mark(block)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    @wraps(forward)
    def recomputed(x_BTD: Tensor, added_BTD: Tensor | None, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x_BTD, added_BTD, *rest)
        if added_BTD is not None:  # added here, so that one tensor is kept and not two
            x_BTD = x_BTD + added_BTD
        return checkpoint(forward, x_BTD, None, *rest, **options)

    block.forward = recomputed  # type: ignore[method-assign,assignment]


class SelectivePolicy:
    """Keeps what KEPT names, but for the last product: backward needs its inputs, and not its output.

    In a tensor group (`scattered`: it sums its products and scatters the sums) attention's last product has all tokens
    of a sequence, as a part of their sums: it is computed again, and its sum is kept, which is scattered and has this
    rank's tokens. Nothing is scattered again then.

    torch.compile asks for each operation after it has traced all of them, when no mark says where an operation is: it
    keeps every product that backward needs, and drops the rest by itself.
    """

    def __init__(self, *, scattered: bool = False) -> None:
        self._scattered, self._dropped, self._in_last = scattered, False, False

    def mark(self, block: Block) -> Callable[..., Any]:
        """Follow the block's products, and return its forward pass."""
        self._mark(block.mlp.down, last=True)
        if self._scattered:
            self._mark(block.attention.wo, last=False)
        forward: Callable[..., Any] = block.forward

        @wraps(forward)
        def begun(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args)
            self._in_last = False
            try:
                return forward(*args)
            finally:
                self._in_last = False

        return begun

    def _mark(self, product: nn.Module, *, last: bool) -> None:
        forward: Callable[..., Any] = product.forward

        @wraps(forward)
        def marked(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args)
            self._dropped, self._in_last = True, last
            try:
                return forward(*args)
            finally:
                self._dropped = False

        product.forward = marked

    def __call__(self, _: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        schema = getattr(operation, "_schema", None)  # FlexAttention has none: it is computed again
        name = "" if schema is None else schema.name
        kept = (name in KEPT and not self._dropped) or (name == SCATTERED and not self._in_last)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
