"""Which implementation of an operation runs, and what is said where the one that was asked for cannot."""

from typing import Any

import pytest
import torch

from configs import values
from minka.kernels import choose as module
from minka.kernels.choose import OPERATIONS, Kernels, Machine, Work, choose, nearest_row, read_choices
from minka.kernels.rms_norm import WIDEST
from minka.parallel.choose_kernels import kernels_of, obstacles
from minka.parallel.mesh import start_mesh
from minka.plan.layout import Layout
from minka.plan.load_config import validate

H100 = Machine("cuda", "some H100", (9, 0), triton=True)
T4 = Machine("cuda", "Tesla T4", (7, 5), triton=True)
CPU = Machine("cpu")
WIDTHS = {"rms_norm": 4096, "rope": 128, "swiglu": 14336, "cross_entropy": 128256, "attention": 128}
WORK = Work(torch.bfloat16, WIDTHS)
TORCH = ".".join(torch.__version__.split(".")[:2])


def row(operation: str = "rms_norm", width: int = 4096, **times: Any) -> dict[str, Any]:
    usual = {"torch_ms": 2.0, "compile_ms": 1.0, "triton_ms": 1.5, "gpu": "some H100", "torch": TORCH}
    return {"operation": operation, "width": width} | usual | times


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows in place of choices.toml's."""
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "read_choices", lambda: rows)
    return rows


def asked(how: str) -> dict[str, str]:
    return dict.fromkeys(OPERATIONS, how)


def test_what_is_asked_for_runs_where_it_can() -> None:
    assert set(choose(asked("triton") | {"attention": "triton"}, H100, WORK).ways().values()) == {"triton"}
    found = choose(asked("torch") | {"swiglu": "triton"}, H100, WORK)
    assert found == Kernels(rms_norm="aten", swiglu="triton", attention="varlen")
    assert found.fallbacks == ()


@pytest.mark.parametrize(
    ("machine", "work", "why"),
    [
        (CPU, WORK, "there is no GPU"),
        (H100._replace(triton=False), WORK, "triton is not installed"),
        (T4, WORK, "Tesla T4 has compute capability 7.5, and the kernels need 8.0"),
        (H100, WORK._replace(dtype=torch.float64), "in fp32, not in fp64"),
        (H100, WORK._replace(widths=WIDTHS | {"rms_norm": WIDEST + 1}), f"at most {WIDEST:,} fit"),
    ],
    ids=["no GPU", "no triton", "old GPU", "fp64", "too wide"],
)
def test_what_cannot_run_is_replaced_and_said(machine: Machine, work: Work, why: str) -> None:
    found = choose(asked("triton"), machine, work)
    assert found.rms_norm != "triton"
    (said, *_) = found.fallbacks
    assert said.startswith("kernels: ")
    assert why in said
    assert f"; {found.rms_norm} runs instead of triton for rms_norm" in said
    unasked = choose(asked("auto"), machine, work).fallbacks
    assert not any(line.startswith("kernels: ") for line in unasked)  # nothing was asked for


def test_auto_takes_what_was_measured_fastest(measured: list[dict[str, Any]]) -> None:
    measured += [row(), row("rope", 128, triton_ms=3.0), row("swiglu", 14336, triton_ms=0.95)]
    found = choose(asked("auto"), H100, WORK)
    assert (found.rms_norm, found.rope, found.swiglu) == ("triton", "torch", "triton")
    assert "triton 1.5 ms" in found.reasons["rms_norm"]


def test_compiled_blocks_take_an_operator_only_where_it_wins_clearly(measured: list[dict[str, Any]]) -> None:
    measured += [row(), row("rope", 128, triton_ms=0.5), row("swiglu", 14336, triton_ms=0.95)]
    found = choose(asked("auto"), H100, WORK._replace(compiled=True))
    assert (found.rms_norm, found.rope, found.swiglu) == ("aten", "triton", "torch")


@pytest.mark.parametrize("other", [{"gpu": "another"}, {"torch": "2.0"}, {"operation": "rope"}])
def test_measurements_of_another_kind_say_nothing(measured: list[dict[str, Any]], other: dict[str, str]) -> None:
    measured.append(row() | other)
    assert choose(asked("auto"), H100, WORK).rms_norm == "aten"
    assert "nothing measured on some H100" in choose(asked("auto"), H100, WORK).reasons["rms_norm"]


def test_the_nearest_width_counts(measured: list[dict[str, Any]]) -> None:
    measured += [row(width=1024), row(width=8192)]
    assert nearest_row(measured, "rms_norm", "some H100", 2000)["width"] == 1024  # type: ignore[index]
    assert nearest_row(measured, "rms_norm", "some H100", 6000)["width"] == 8192  # type: ignore[index]


def test_the_file_of_choices_is_read() -> None:
    for one in read_choices():
        assert one["operation"] in OPERATIONS
        assert {"gpu", "torch", "width", "torch_ms", "compile_ms", "triton_ms"} <= one.keys()


def test_the_settings_of_a_run_name_every_operation() -> None:
    """One key an operation, over `implementation`; on this machine none can run, and one line says so."""
    config = validate(values(kernels={"implementation": "triton", "swiglu": "torch", "attention": "triton"}), "here")
    assert config.kernels.asked().keys() == {*OPERATIONS, "attention"}
    with start_mesh(config.layout) as mesh:
        found = kernels_of(config, mesh)
        as_gpu = kernels_of(config, mesh, as_gpu=True)
    (said,) = found.fallbacks
    operations = "rms_norm, rope, cross_entropy, adamw, grad_norm"
    attention = "sdpa runs instead of triton for attention"
    assert said == f"kernels: there is no GPU; torch runs instead of triton for {operations}; {attention}"
    assert as_gpu.ways() == dict.fromkeys((*OPERATIONS, "attention"), "triton") | {"swiglu": "torch"}


@pytest.mark.parametrize(
    ("layout", "replaced"),
    [
        ({"offload": "optimizer", "engine": "deepspeed"}, {"adamw": "DeepSpeed", "grad_norm": "DeepSpeed"}),
        ({"offload": "all"}, {"adamw": "on the host", "grad_norm": "on the host"}),
    ],
)
def test_what_an_engine_holds_elsewhere_is_left_to_it(layout: dict[str, Any], replaced: dict[str, str]) -> None:
    found = choose(asked("triton"), H100, WORK._replace(obstacles=obstacles(Layout(**layout))))
    assert {name for name, way in found.ways().items() if name in OPERATIONS and way != "triton"} == replaced.keys()
    for operation, why in replaced.items():
        assert why in found.reasons[operation]


@pytest.mark.parametrize(
    ("wanted", "machine", "work", "provider", "why"),
    [
        ("auto", H100, WORK, "varlen", "nothing measured"),
        ("auto", H100, WORK._replace(dtype=torch.float32), "sdpa", "half precision, and the run in float32"),
        ("auto", T4, WORK._replace(dtype=torch.float16), "sdpa", "compute capability 7.5"),
        ("auto", CPU, WORK, "sdpa", "there is no GPU"),
        ("auto", H100, WORK._replace(widths=WIDTHS | {"attention": 320}), "sdpa", "heads of 320 channels"),
        ("sdpa", H100, WORK, "sdpa", "asked for"),
        ("triton", H100, WORK._replace(dtype=torch.float32), "triton", "asked for"),
        ("triton", T4, WORK._replace(dtype=torch.float32), "sdpa", "compute capability 7.5"),
        ("flash-attn", H100, WORK, "sdpa", "flash-attn is not installed"),
        ("flex", H100, WORK, "flex", "asked for"),
        ("flex", H100, WORK._replace(dtype=torch.float32), "flex", "asked for"),
        ("flex", CPU, WORK, "sdpa", "there is no GPU"),
        ("varlen", CPU, WORK, "sdpa", "there is no GPU"),
        ("flex", H100, WORK._replace(widths=WIDTHS | {"attention": 8}), "sdpa", "at least 16"),
        ("varlen", H100, WORK._replace(widths=WIDTHS | {"attention": 64}), "varlen", "asked for"),
        # torch's kernels take multiples of 8; ours takes any width
        ("auto", H100, WORK._replace(widths=WIDTHS | {"attention": 100}), "triton", "100 channels, and varlen takes"),
    ],
)
def test_who_provides_attention(wanted: str, machine: Machine, work: Work, provider: str, why: str) -> None:
    found = choose({"attention": wanted}, machine, work)
    assert found.attention == provider
    assert why in found.reasons["attention"]
    assert len(found.fallbacks) == (provider != wanted and wanted != "auto")


def test_what_holds_all_logits_is_never_taken_silently() -> None:
    for machine, work in (
        (T4, WORK),  # bf16, which no other backend has there
        (H100._replace(triton=False), WORK._replace(widths=WIDTHS | {"attention": 100})),
    ):
        found = choose({}, machine, work)
        assert found.attention == "sdpa"
        assert any("holds all logits" in line for line in found.fallbacks)
    assert choose({}, H100, WORK).fallbacks == choose({}, CPU, WORK).fallbacks == ()


def test_torchs_adamw_has_no_bf16_state() -> None:
    """Then Triton's runs wherever it can, measured or not; elsewhere the slow definition, which is said."""
    rounding = WORK._replace(only_defined={"adamw": "torch's kernel has no stochastic rounding"})
    found = choose(asked("auto"), H100, rounding)
    assert (found.adamw, found.fallbacks) == ("triton", ())
    for how, machine in (("auto", CPU), ("torch", H100), ("auto", H100._replace(triton=False))):
        found = choose(asked(how), machine, rounding)
        (said,) = (line for line in found.fallbacks if line.startswith("kernels.adamw"))
        assert "no stochastic rounding" in said
        assert "many times slower" in said


def test_attention_takes_the_fastest_that_can_run(measured: list[dict[str, Any]]) -> None:
    measured.append(row("attention", 128) | {"varlen_ms": 3.0, "triton_ms": 2.0, "flash-attn_ms": 1.0})
    assert choose({}, H100, WORK).attention == "triton"  # flash-attn is not installed
    assert choose({}, H100, WORK._replace(dtype=torch.float64)).attention == "sdpa"
