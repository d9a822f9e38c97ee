"""What decides memory and traffic follows from numbers alone, and training asks the same functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minka.model.transformer import Block
from minka.parallel.fsdp import block_bytes
from minka.plan.config_sections import KernelsSection, ModelSection
from minka.plan.execution_choices import (
    CPU_ROWS,
    GPU_LOGITS,
    KEEP_BYTES,
    UNIT_BYTES,
    attention_kind,
    compiles_full_graph,
    compute_dtype_name,
    frees_gathered_weights,
    fsdp_units,
    logit_rows,
    needs_fsdp,
    replaceable_kernels,
)
from minka.plan.flops import Shape
from minka.plan.layout import Layout


@given(st.lists(st.integers(1, 3 * UNIT_BYTES), max_size=40))
def test_units_are_consecutive_and_large_enough_and_leave_no_block_out(sizes: list[int]) -> None:
    units = fsdp_units(sizes)
    if sum(sizes) < UNIT_BYTES:
        assert units == []
        return
    assert [block for unit in units for block in unit] == list(range(len(sizes)))
    assert all(sum(sizes[block] for block in unit) >= UNIT_BYTES for unit in units[:-1])
    if len(units) > 1 and sum(sizes[block] for block in units[-1]) < UNIT_BYTES:
        assert len(units[-1]) * 2 > len(units[-2])  # else it would have joined the unit before


@pytest.mark.parametrize(
    ("sizes", "units"),
    [
        ([4, 4, 4, 4], [range(2), range(2, 4)]),
        ([2] * 9, [range(4), range(4, 9)]),
        ([2] * 11, [range(4), range(4, 8), range(8, 11)]),
        ([8, 8, 1], [range(1), range(1, 2), range(2, 3)]),
        ([1] * 7, []),
    ],
)
def test_a_short_rest_joins_the_last_unit(sizes: list[int], units: list[range]) -> None:
    eighth = UNIT_BYTES // 8
    assert fsdp_units([size * eighth for size in sizes]) == units


@pytest.mark.parametrize(
    ("layout", "size", "frees"),
    [
        ({}, KEEP_BYTES, False),
        ({}, KEEP_BYTES + 1, True),
        ({"pipeline": 2}, 10 * KEEP_BYTES, False),
        ({"reshard": "always"}, 1, True),
        ({"reshard": "never"}, 10 * KEEP_BYTES, False),
        ({"reshard": "always", "pipeline": 2}, 1, True),
    ],
)
def test_gathered_weights_are_freed_when_they_are_large_and_gathered_once(
    layout: dict[str, object], size: int, frees: bool
) -> None:
    assert frees_gathered_weights(Layout.model_validate(layout), size) is frees


def test_logits_of_a_gpu_fill_a_gib_and_a_cpu_has_few() -> None:
    assert logit_rows(2**17, "cuda") * 2**17 == GPU_LOGITS
    assert logit_rows(2**21, "cuda") == CPU_ROWS
    assert logit_rows(2**17, "cpu") == logit_rows(256, "cpu") == CPU_ROWS


@pytest.mark.parametrize(
    ("precision", "device", "name"),
    [
        ("auto", "cuda", "bf16"),
        ("auto", "cpu", "fp32"),
        ("bf16", "cpu", "bf16"),
        ("fp32", "cuda", "fp32"),
        ("fp64", "cuda", "fp64"),
    ],
)
def test_only_auto_depends_on_the_device(precision: str, device: str, name: str) -> None:
    assert compute_dtype_name(Layout.model_validate({"precision": precision}), device) == name


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "kind"),
    [
        ("auto", "cuda", "bf16", "varlen"),
        ("varlen", "cuda", "fp16", "varlen"),
        ("sdpa", "cuda", "bf16", "mask"),
        ("auto", "cuda", "fp32", "mask"),
        ("auto", "cpu", "bf16", "mask"),
    ],
)
def test_documents_are_kept_apart_by_varlen_kernels_where_they_run(
    setting: str, device: str, dtype: str, kind: str
) -> None:
    assert attention_kind(setting, device, dtype) == kind
    assert attention_kind(setting, device, dtype, packed=False) == "causal"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bf16"), ("cuda", "fp32"), ("cuda", "fp64")])
def test_a_mask_replaces_varlen_kernels_where_they_do_not_run(device: str, dtype: str) -> None:
    assert attention_kind("varlen", device, dtype) == "mask"


def test_a_run_that_a_different_machine_may_compute_differently_says_so() -> None:
    plain = KernelsSection().asked()
    assert replaceable_kernels(plain, bf16_state=False) == ""
    said = replaceable_kernels(plain | {"rope": "triton", "attention": "flex"}, bf16_state=False)
    assert said.startswith("kernels: attention (flex), rope (triton) run where the machine can run them")
    assert "many times slower" in replaceable_kernels(plain, bf16_state=True)
    assert "many times slower" in replaceable_kernels(plain | {"adamw": "torch"}, bf16_state=True)


def test_fsdp_has_work_where_weights_are_cut_cast_or_fetched() -> None:
    assert not needs_fsdp(Layout(shard=1, tensor=2, pipeline=2), casts=False)
    assert needs_fsdp(Layout(shard=1), casts=True)
    for cut in ({"shard": 2}, {"replicate": 2}, {"context": 2}, {"offload": "all"}):
        assert needs_fsdp(Layout.model_validate({"shard": 1, **cut}), casts=False)


def test_recomputation_and_context_break_the_full_graph() -> None:
    assert compiles_full_graph(Layout(tensor=2, pipeline=2))
    assert not compiles_full_graph(Layout(recompute="block"))
    assert not compiles_full_graph(Layout(context=2))


@pytest.mark.parametrize("extra", ["", "qkv_bias", "qk_norm"])
def test_the_bytes_of_a_block_follow_from_the_shape(extra: str) -> None:
    section = ModelSection(layers=1, d_model=48, heads=6, kv_heads=2, head_dim=10, d_ff=72, vocab=256)
    section = section.model_copy(update={extra: True} if extra else {})
    with torch.device("meta"):
        block = Block(section)
    shape = Shape.of(section)
    assert block_bytes([block], torch.bfloat16) == [2 * (shape.matrices(1) + shape.layer_vectors)]
