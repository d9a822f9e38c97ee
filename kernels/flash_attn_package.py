"""The flash-attn package, where it is installed: version 4 (flash_attn.cute), 3 (flash_attn_interface) or 2."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}


@cache
def installed_version() -> int:
    """The newest of the versions that is installed; 0 without any."""
    for version, module in MODULES.items():
        package, _, inner = module.partition(".")
        if find_spec(package) is not None and (not inner or find_spec(module) is not None):
            return version
    return 0


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """Causal attention of documents aligned bottom-right, [tokens, H, C]; K divides H."""
    y = _function()(
        q,
        k,
        v,
        cu_seqlens_q=q_starts,
        cu_seqlens_k=k_starts,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        causal=True,
    )
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


@cache
def _function() -> Callable[..., Any]:
    function: Callable[..., Any] = import_module(MODULES[installed_version()]).flash_attn_varlen_func
    return function
