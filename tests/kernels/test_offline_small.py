"""Norm, SwiGLU and RoPE as they would run on a GPU, compiled without one."""

from typing import Any

import pytest

import offline
from minka.kernels import adamw, cross_entropy, many_tensors, norm_rope, rms_norm, rope, squared_norm, swiglu
from offline import CAPABILITIES, compile_kernel

FP32 = {"eps": "fp32", "sign": "fp32"} | dict.fromkeys(
    ("INV", "W", "DW", "DQW", "DKW", "COS", "SIN", "QW", "KW"), "*fp32"
)


def types(kernel: Any) -> dict[str, str]:
    """Tensors have upper-case names, and are bf16 where FP32 does not say otherwise."""
    return {n: FP32.get(n, "*bf16" if n.isupper() else "i32") for n in kernel.arg_names}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", [swiglu._forward_kernel, swiglu._backward_kernel], ids=["forward", "backward"])
@pytest.mark.parametrize("width", [96, 14336])
def test_swiglu(kernel: Any, width: int, capability: int) -> None:
    rows, columns = swiglu.tile(width)
    compile_kernel(kernel, types(kernel), {"ROWS": rows, "WIDTH": columns}, capability).check()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [64, 128, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("add", [False, True], ids=["alone", "after a sum"])
def test_rms_norm(width: int, add: bool, capability: int) -> None:
    forward, backward = rms_norm.forward_tile(2**16, width), rms_norm.backward_tile(2**16, width)
    wide = backward.columns < width
    for kernel, launch in (
        (rms_norm._forward_kernel, forward),
        (rms_norm._wide_backward_kernel if wide else rms_norm._backward_kernel, backward),
    ):
        constants = {"ADD": add, "ROWS": launch.rows, "WIDTH": launch.columns}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        compile_kernel(kernel, types(kernel), constants, capability, launch.warps).check()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_rope(width: int, capability: int) -> None:
    forward, backward = rope._forward_kernel, norm_rope._backward_kernel
    rows, half = rope.head_tile(width, rope.TILE)
    for norm in (False, True):
        constants = {"NORM": norm, "ROWS": rows, "HALF": half}
        compile_kernel(forward, types(forward), constants, capability).check()
    rows, half = rope.head_tile(width, norm_rope.BACKWARD_TILE)
    constants = {"ROWS": rows, "HALF": half}
    compile_kernel(backward, types(backward), constants, capability, norm_rope.BACKWARD_WARPS).check()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("vocab", [2048, 32000, 128256])
def test_cross_entropy(vocab: int, dtype: str, capability: int) -> None:
    other = {"TARGET": "*i64", "BEST": "*i64", "HIT": "*i1", "COUNTS": "*i1", "X": dtype, "z_weight": "fp32"}
    for kernel, constants in (
        (cross_entropy._cross_entropy_kernel, {"GRADIENT": True, "HITS": False}),
        (cross_entropy._cross_entropy_kernel, {"GRADIENT": False, "HITS": True}),
        (cross_entropy._statistics_kernel, {"HITS": True}),
        (cross_entropy._gradient_kernel, {}),
    ):
        given = {n: other.get(n, "*fp32" if n.isupper() else "i32") for n in kernel.arg_names}
        block, warps = cross_entropy.row_block(vocab)
        compile_kernel(kernel, given, {**constants, "BLOCK": block}, capability, warps).check()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_many_tensors(half: bool, aligned: bool, capability: int) -> None:
    other = {"AT": "*i64", "WHICH": "*i32", "FIRST": "*i64", "SIZES": "*i64", "ACCEPT": "*i1", "tensors": "i32"}
    other |= {"FACTORS": "*fp64", "SUMS": "*fp64", "KEYS": "*i64", "BOXES": "*i64"}
    for kernel in (adamw._kernel, squared_norm._kernel):
        given = {n: other.get(n, "*fp32" if n.isupper() else "fp32") for n in kernel.arg_names}
        constants = {"ALIGNED": aligned, "CHUNK": many_tensors.CHUNK}
        constants |= {name: half for name in kernel.arg_names if name.endswith("16")}
        compile_kernel(kernel, given, constants, capability, many_tensors.WARPS).check()


def test_a_spill_and_a_narrow_offset_are_seen() -> None:
    """The checks of this file find what they look for."""
    launch = rms_norm.backward_tile(2**16, 4096)
    constants = {"ADD": True, "ROWS": 4 * launch.rows, "WIDTH": 16384}
    with pytest.raises(AssertionError, match="spilled"):
        compile_kernel(rms_norm._backward_kernel, types(rms_norm._backward_kernel), constants, 90, 4).check()
    narrow = """
      %0 = tt.get_program_id x : i32
      %1 = arith.muli %0, %arg3 : i32
    """
    assert offline.narrow_products(narrow) == ["%1 = arith.muli %0, %arg3 : i32"]
