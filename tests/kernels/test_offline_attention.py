"""Flash attention as it would run on a GPU, compiled without one."""

import re
from typing import Any

import pytest

from minka.kernels import flash_attention_backward, flash_attention_forward
from minka.kernels.flash_attention_forward import Launch, padded
from offline import CAPABILITIES, Compiled, compile_kernel

DTYPES = {"*bf16": 2, "*fp32": 4}
WIDTHS = (64, 96, 128, 256)
SMALL_SHARED_LIMIT = 99 * 1024  # bytes of a block on GeForce and L40S; an A100 has 163 KiB


def compiled(kernel: Any, launch: Launch, width: int, dtype: str, capability: int) -> Compiled:
    """As torch's allocations call it: addresses and strides are multiples of 16."""
    other = {"LSE": "*fp32", "DELTA": "*fp32", "FIRST": "*i32", "END": "*i32", "scale": "fp32"}
    types = {name: other.get(name, dtype if name.isupper() else "i32") for name in kernel.arg_names}
    columns = padded(width)
    constants = {"QUERIES": launch.queries, "KEYS": launch.keys, "COLUMNS": columns, "WIDTH": width}
    steps = (name for name in kernel.arg_names if name.endswith(("_token", "_head")))
    tensors = (name for name in kernel.arg_names if types[name] == dtype and name not in constants)
    return compile_kernel(kernel, types, constants, capability, launch.warps, launch.stages, (*tensors, *steps))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel(width: int, dtype: str, capability: int) -> None:
    """Half precision runs on tensor cores; gradients of keys of 256 channels fit only into blocks too low for wgmma."""
    given = width, DTYPES[dtype], (capability // 10, 0)
    for kernel, launch in (
        (flash_attention_forward.forward_kernel, flash_attention_forward.forward_launch(*given)),
        (flash_attention_backward.keys_kernel, flash_attention_backward.keys_launch(*given)),
        (flash_attention_backward.queries_kernel, flash_attention_backward.queries_launch(*given)),
    ):
        found = compiled(kernel, launch, width, dtype, capability)
        found.check()
        assert capability >= 90 or found.shared <= SMALL_SHARED_LIMIT
        if dtype == "*bf16":
            low = width == 256 and kernel is flash_attention_backward.keys_kernel
            assert found.tensor_cores(80 if low else capability)
            assert not re.search(r"ld\.global\S*\.b16", found.ptx), "single numbers are loaded, not 16 bytes at once"
            assert launch.stages == 1 or re.search(r"cp\.async\.cg\.shared\.global.* 0x10", found.ptx)


def test_each_gpu_has_blocks_that_fit() -> None:
    """GeForce and RTX PRO of Blackwell, 12.0, have as little shared memory as those of Ampere and Ada."""
    for launch in (
        flash_attention_forward.forward_launch,
        flash_attention_backward.keys_launch,
        flash_attention_backward.queries_launch,
    ):
        assert launch(128, 2, (8, 6)) == launch(128, 2, (8, 9)) == launch(128, 2, (12, 0)) == launch(96, 2, (8, 0))
        assert launch(128, 2, (9, 0)) == launch(128, 2, (10, 0)) != launch(128, 2, (8, 0))
        assert launch(2, 2, (9, 0)) == launch(64, 2, (9, 0))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sums_for_backward(capability: int) -> None:
    kernel, launch = flash_attention_backward.delta_kernel, Launch(64, 64, 4, 3)
    types = {name: "*fp32" if name == "DELTA" else "*bf16" if name.isupper() else "i32" for name in kernel.arg_names}
    constants = {"ROWS": flash_attention_backward.DELTA_ROWS, "WIDTH": 96, "COLUMNS": 128}
    compile_kernel(kernel, types, constants, capability, launch.warps).check()
