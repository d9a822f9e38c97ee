"""`minka plan time`, `layout` and `calibrate` as commands: tables, JSON, pictures, and refusals as one paragraph."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from measured_runs import written_run
from minka.plan.cluster import cluster_toml, find_cluster
from minka.plan.command import main


def asked(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    found = main(list(words))
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked(capsys, *words, "--json")[0])
    return found


def test_time_has_the_keys_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "time", "llama3-8b", "--gpu", "H100-SXM", "--world", "64", "--dollars", "2")
    assert found["step_seconds"] == pytest.approx(sum(found["breakdown_seconds"].values()))
    assert set(found["mfu"]) == {"causal", "palm", "6n", "megatron"}
    assert found["tokens_per_second_per_gpu"] > 0
    assert found["dollars"] == pytest.approx(2 * found["gpu_hours"])
    assert found["calibrated"] == "not calibrated"
    table, _ = asked(capsys, "time", "llama3-8b", "--gpu", "H100-SXM", "--world", "64")
    assert "matrix products" in table
    assert "not calibrated" in table


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_plans_are_drawn(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for words in (["time", "dense-125m"], ["layout", "dense-125m", "--top", "2"]):
        path = tmp_path / f"{words[0]}.{ending}"
        asked(capsys, *words, "--gpu", "H100-SXM", "--plot", str(path))
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["time", "llama3-8b"], "on what it runs is missing"),
        (["time", "llama3-8b", "--gpu", "H10"], "no GPU 'H10' is known"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--world", "0"], "--world"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--world", "-8"], "--world"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--dollars", "-1"], "--price-per-gpu-hour"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--price-per-gpu-hour", "nan"], "--price-per-gpu-hour"),
        (["time", "llama3-8b", "--gpu", "none.toml"], "none.toml"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--rates", "none.toml"], "none.toml"),
        (["time", "llama3-8b", "--gpu", "H100-SXM", "--plot", "x.pdf"], "--plot"),
        (["time", "llama3-80b", "--gpu", "H100-SXM"], "llama3-8b"),
        (["time", "llama3-8b", "layout.tensor=3", "--gpu", "H100-SXM", "--world", "8"], "layout"),
        (["layout", "llama3-8b", "--gpu", "H100-SXM", "--top", "0"], "--top"),
        (["layout", "llama3-405b", "--gpu", "H100-SXM", "--world", "8"], "no legal layout"),
        (["calibrate", "nothing-here"], "nothing-here"),
        (["calibrate"], "runs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_paragraph(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = asked(capsys, *words, status=2)
    assert said in err
    assert "Traceback" not in err
    assert not out


def test_measured_runs_calibrate_the_next_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps that took twice what is tabulated: the fitted rates say so, and plans that use them."""
    runs, device = [], "NVIDIA H100 80GB HBM3"
    for number, overrides in enumerate(([], ["layout.micro_batch=2"], ["data.seq_len=2048", "layout.micro_batch=4"])):
        words = ["time", "llama3-8b", *overrides, "--gpu", "H100-SXM", "--world", "8"]
        seconds = document(capsys, *words)["step_seconds"] * 1.5
        runs.append(written_run(tmp_path, f"run-{number}", seconds, device, *overrides))
    rates = tmp_path / "rates.toml"
    found = document(capsys, "calibrate", *runs, "-o", str(rates))
    assert found["gpu"] == "H100-SXM"
    assert found["calibrated"].startswith("calibrated on run-0, run-1, run-2")
    for run in found["runs"]:
        assert run["error_before"] == pytest.approx(1 / 1.5 - 1, abs=0.02)
        assert abs(run["error"]) < 0.05
        assert abs(run["error_left_out"]) < 0.08
    words = ["time", "llama3-8b", "--gpu", "H100-SXM", "--world", "8"]
    before, after = document(capsys, *words), document(capsys, *words, "--rates", str(rates))
    assert after["step_seconds"] / before["step_seconds"] == pytest.approx(1.5, rel=0.05)
    assert after["calibrated"] == found["calibrated"]
    table, _ = asked(capsys, "calibrate", *runs)
    assert "written" in table


def test_runs_that_cannot_calibrate_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = written_run(tmp_path, "short", 1.0, "NVIDIA H200", readings=2)
    other = written_run(tmp_path, "other", 1.0, "NVIDIA B200")
    unknown = written_run(tmp_path, "unknown", 1.0, "AMD EPYC")
    long = written_run(tmp_path, "long", 1.0, "NVIDIA H200")
    assert "too few" in asked(capsys, "calibrate", short, status=2)[1]
    assert "NVIDIA B200, NVIDIA H200" in asked(capsys, "calibrate", long, other, status=2)[1]
    assert "doctor --machine" in asked(capsys, "calibrate", unknown, status=2)[1]
    nowhere = tmp_path / "none/rates.toml"
    assert "rates.toml" in asked(capsys, "calibrate", long, "-o", str(nowhere), status=2)[1]


def test_a_run_that_does_not_fit_says_so_next_to_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "time", "llama3-8b", "--gpu", "H100-SXM")
    assert "GiB at the peak" in found["does_not_fit"]
    assert document(capsys, "time", "llama3-8b", "--gpu", "H100-SXM", "--world", "64")["does_not_fit"] == ""
    assert "padding" in document(capsys, "time", "llama3-8b", "--gpu", "H100-SXM", "--world", "96")["padding"]


def test_the_peak_of_a_table_is_that_of_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("time", "layout"):
        assert main([command, "llama3-8b", "layout.precision=fp32", "--gpu", "H100-SXM", "--world", "64"]) == 2
        assert "bf16" in capsys.readouterr().err


def test_a_machine_is_not_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(cluster_toml(find_cluster("H100-SXM")))
    assert main(["time", "llama3-8b", "--gpu", "H100-SXM", "--world", "64", "--rates", str(file)]) == 2
    assert f"--gpu {file}" in capsys.readouterr().err


def test_a_machine_with_a_peak_of_its_own_may_compute_in_fp32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(cluster_toml(replace(find_cluster("H100-SXM"), peak_tflops=67.0)))
    words = ["time", "llama3-8b", "layout.precision=fp32", "--world", "64"]
    slow = document(capsys, *words, "--gpu", str(file))["step_seconds"]
    assert slow > 5 * document(capsys, "time", "llama3-8b", "--world", "64", "--gpu", "H100-SXM")["step_seconds"]
