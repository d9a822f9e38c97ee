"""Kernels in Triton's interpreter, on CPU tensors. test_interpreted.py starts a process of its own for each file here.

The interpreter is chosen when a kernel is defined, so this folder cannot share a process with other tests.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written is NaN: an output that a kernel leaves out cannot look right."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
