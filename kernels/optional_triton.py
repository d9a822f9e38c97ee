"""Triton where it is installed. Elsewhere the kernels are defined all the same, and none can be launched."""

import os
from collections.abc import Callable
from typing import Any

# Multiplications and additions are fused, as up to triton 3.9; 3.10 turns that off unless it is told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # macOS, Windows

    class tl:  # type: ignore[no-redef]
        """What the signatures of kernels name."""

        constexpr = object

    triton = None  # type: ignore[assignment]

    def jit(kernel: Callable[..., Any]) -> Any:
        return kernel


__all__ = ["interprets", "jit", "power_of_two", "tl", "triton"]


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were defined)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)
