"""What the kernels' bench writes is what `auto` reads."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.benchmarks import kernels
from minka.benchmarks.kernel_cases import kernel_cases
from minka.kernels import choose as choices
from minka.kernels.choose import Machine, Work, choose, read_choices, torch_version


def timing(way: str, ms: float, name: str = "forward", **other: Any) -> dict[str, Any]:
    return {"operation": "rope", "width": 128, "note": "alone", "pass": name, "way": way, "ms": ms} | other


def test_both_passes_count_and_the_first_case_of_a_width_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = [timing(way, ms, name) for way, ms in (("torch", 2.0), ("compile", 1.0), ("triton", 0.75))
               for name in ("forward", "backward")]  # fmt: skip
    timings += [timing("triton", 90.0, note="with norms of heads")]
    rows = kernels.merged(timings, "some H100")
    (row,) = rows
    assert (row["torch_ms"], row["compile_ms"], row["triton_ms"]) == (4.0, 2.0, 1.5)
    file = tmp_path / "choices.toml"
    monkeypatch.setattr(choices, "CHOICES", file)
    file.write_text("")
    read_choices.cache_clear()
    try:
        file.write_text(kernels.choices_text(rows))
        read_choices.cache_clear()
        older = row | {"gpu": "another", "date": "2020-01-01"}
        file.write_text(kernels.choices_text([older]))  # rows of other GPUs stay
        read_choices.cache_clear()
        assert [one["gpu"] for one in read_choices()] == ["some H100", "another"]
        machine = Machine("cuda", "some H100", (9, 0), triton=True)
        work = Work(torch.bfloat16, {"rope": 128, "rms_norm": 64, "attention": 128})
        assert choose({}, machine, work).rope == "triton"
        assert read_choices()[0]["torch"] == torch_version()
    finally:
        read_choices.cache_clear()


def test_a_way_that_failed_in_one_pass_is_not_chosen_by_the_other() -> None:
    timings = [timing(way, 4.0, name) for way in ("torch", "triton") for name in ("forward", "backward")]
    timings += [timing("flex", 1.0)]
    (row,) = kernels.merged(timings, "some H100")
    assert row["torch_ms"] == row["triton_ms"] == 8.0
    assert "flex_ms" not in row


def test_rows_that_lack_a_way_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = {"gpu": "some H100", "torch": torch_version(), "operation": "rope", "width": 128, "triton_ms": 1.0}
    monkeypatch.setattr(choices, "read_choices", lambda: (lone,))
    work = Work(torch.bfloat16, {"rope": 128, "rms_norm": 64, "attention": 128})
    assert choose({}, Machine("cuda", "some H100", (9, 0), triton=True), work).rope == "torch"


def test_what_fails_is_said_and_what_was_measured_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    cases = [case._replace(ways={**case.ways, "torch": broken}) if case.operation == "rope" else case
             for case in kernel_cases("tiny")]  # fmt: skip
    monkeypatch.setattr(kernels, "kernel_cases", lambda _: cases)
    monkeypatch.setattr(sys, "argv", ["kernels", "--tiny"])
    assert kernels.main() == 0
    found = capsys.readouterr()
    assert "failed: torch's rope 16 alone, forward: RuntimeError: no such kernel" in found.err
    assert "swiglu" in found.out


def test_the_page_has_the_table_of_what_was_measured() -> None:
    page = kernels.PAGE.read_text()
    assert kernels.page_text(page, read_choices()) == page
    row = {
        "gpu": "some H100",
        "torch": "2.11",
        "operation": "rope",
        "width": 128,
        "date": "2026-01-01",
        "torch_ms": 2.5,
    }
    written = kernels.page_text(page, [row])
    assert "| some H100 | 2.11 | 2026-01-01 | rope | 128 | 2.5 |" in written
    assert kernels.page_text(written, read_choices()) == page


def test_nothing_is_written_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = choices.CHOICES.read_text()
    monkeypatch.setattr(sys, "argv", ["kernels", "--tiny", "--write"])
    with pytest.raises(SystemExit, match="2"):
        kernels.main()
    assert "needs a GPU" in capsys.readouterr().err
    assert choices.CHOICES.read_text() == before
