"""Flash attention as it would run on a GPU, compiled without one."""

from typing import Any

import pytest

from minka.kernels import flash_attention_backward, flash_attention_forward
from minka.kernels.flash_attention_forward import Launch, padded
from offline import CAPABILITIES, Compiled, compile_kernel

DTYPES = {"*bf16": 2, "*fp32": 4}
WIDTHS = (64, 96, 128, 256)


def compiled(kernel: Any, launch: Launch, width: int, dtype: str, capability: int) -> Compiled:
    """As torch's allocations call it: addresses and strides are multiples of 16."""
    other = {"LSE": "*fp32", "DELTA": "*fp32", "FIRST": "*i32", "END": "*i32", "scale": "fp32"}
    types = {name: other.get(name, dtype if name.isupper() else "i32") for name in kernel.arg_names}
    columns = padded(width)
    constants = {"QUERIES": launch.queries, "KEYS": launch.keys, "COLUMNS": columns, "FULL": columns == width}
    steps = (name for name in kernel.arg_names if name.endswith(("_token", "_head")))
    tensors = (name for name in kernel.arg_names if types[name] == dtype and name not in constants)
    return compile_kernel(kernel, types, constants, capability, launch.warps, launch.stages, (*tensors, *steps))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_kernel(width: int, dtype: str, capability: int) -> None:
    """Half precision runs on tensor cores; 256 channels fit only into blocks that wgmma does not take."""
    given = width, DTYPES[dtype], (capability // 10, 0)
    for kernel, launch in (
        (flash_attention_forward.forward_kernel, flash_attention_forward.forward_launch(*given)),
        (flash_attention_backward.keys_kernel, flash_attention_backward.keys_launch(*given)),
        (flash_attention_backward.queries_kernel, flash_attention_backward.queries_launch(*given)),
    ):
        found = compiled(kernel, launch, width, dtype, capability)
        found.check()
        narrow = width == 256 and kernel is flash_attention_backward.keys_kernel
        assert dtype == "*fp32" or found.tensor_cores(80 if narrow else capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sums_for_backward(capability: int) -> None:
    kernel, launch = flash_attention_backward.delta_kernel, Launch(64, 64, 4, 3)
    types = {name: "*fp32" if name == "DELTA" else "*bf16" if name.isupper() else "i32" for name in kernel.arg_names}
    constants = {"ROWS": flash_attention_backward.DELTA_ROWS, "COLUMNS": 128}
    compile_kernel(kernel, types, constants, capability, launch.warps).check()
