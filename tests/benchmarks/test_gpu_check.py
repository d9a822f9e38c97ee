"""What a machine with a GPU is asked for runs here with tiny sizes, so that it starts when there is one."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minka.benchmarks import gpu_check, gpu_training
from minka.benchmarks.gpu_check import Step, run, steps
from minka.benchmarks.kernel_cases import kernel_cases
from minka.benchmarks.kernels import in_turns
from minka.benchmarks.step_rows import append
from minka.plan.load_config import load_run
from minka.train.dry_run import dry_run


@pytest.mark.parametrize("call", ["first", "training"])
def test_each_call_runs_with_tiny_sizes(call: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minka.benchmarks.gpu_check", call, "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    for step in steps(call, tmp_path, tiny=True, write=False):
        line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(f"{step.name}  "))
        assert ("skipped" if step.tests else "passed") in line
    assert not any(tmp_path.iterdir())  # runs and stores were temporary


def test_what_takes_too_long_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    late = run(Step("sleep", (sys.executable, "-c", "import time; time.sleep(60)"), 60), 0.5, skips=False)
    assert (late.passed, late.how) == (False, "took more than 0 s")
    assert late.seconds < 30
    failed = run(Step("fail", (sys.executable, "-c", "raise SystemExit(3)"), 60), 60, skips=True)
    assert (failed.passed, failed.how) == (False, "exit status 3")
    assert run(Step("late", (sys.executable, "-c", ""), 60), 0, skips=True).how == "no time was left"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "first", "--tiny"])
    monkeypatch.setattr(gpu_check, "steps", lambda *_, **__: [Step("fail", (sys.executable, "-c", "exit(1)"), 60)])
    assert gpu_check.main() == 1


@pytest.mark.parametrize(
    ("tests", "skips", "passed", "how"),
    [
        ({"tests": 52, "skipped": 52}, True, True, "52 skipped"),
        ({"tests": 52, "skipped": 52}, False, False, "failed: 52 skipped"),
        ({"tests": 52, "skipped": 2}, False, True, "50 passed, 2 skipped"),
        ({"tests": 52, "skipped": 0}, False, True, "52 passed"),
    ],
)
def test_skipped_tests_are_counted_and_are_not_a_pass(
    tests: dict[str, int], skips: bool, passed: bool, how: str, tmp_path: Path
) -> None:
    file = tmp_path / "tests.xml"
    counts = " ".join(f'{name}="{count}"' for name, count in tests.items())
    file.write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    ending = run(Step("tests", (sys.executable, "-c", ""), 60, tests=file), 60, skips=skips)
    assert (ending.passed, ending.how) == (passed, how)


def test_a_step_that_can_be_told_begins_nothing_that_could_not_end() -> None:
    (training,) = steps("training", Path("x"), tiny=False, write=False)
    assert gpu_check.told(training, 500).command[-2:] == ("--seconds", "350")
    assert gpu_check.told(training, 10).command[-2:] == ("--seconds", "0")
    demo, *_ = steps("first", Path("x"), tiny=False, write=False)
    assert gpu_check.told(demo, 500) == demo


def test_both_calls_end_within_their_time(tmp_path: Path) -> None:
    for call in ("first", "training"):
        assert max(step.seconds for step in steps(call, tmp_path, tiny=False, write=True)) <= gpu_check.SECONDS


def test_a_case_that_fails_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(case: gpu_training.Case, *_: object, **__: object) -> dict[str, object]:
        if case.peer:
            raise RuntimeError("out of memory\nand more")
        return {"case": case.name}

    file = tmp_path / "measured.csv"
    monkeypatch.setattr(gpu_training, "measure", refuse)
    monkeypatch.setattr(sys, "argv", ["gpu_training", "--tiny", "--json", "--csv", str(file)])
    assert gpu_training.main() == 1
    found = capsys.readouterr()
    assert "failed: dense-1b: RuntimeError: out of memory\n" in found.err
    with file.open(newline="") as lines:
        written = [row["case"] for row in csv.DictReader(lines)]
    assert written == [case.name for case in gpu_training.cases(tiny=True) if not case.peer]


@pytest.mark.parametrize(
    ("gib", "layers"), [pytest.param(*one, marks=pytest.mark.slow) for one in ((79.1, 32), (48, None))]
)
def test_a_model_gets_the_layers_that_fit(gib: float, layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By dry runs of the 8B shape, without a GPU; all of it fits into an H100."""
    large = next(case for case in gpu_training.cases(tiny=False) if case.recipe == "llama3-8b")
    config = load_run(large.recipe, large.overrides).config
    device = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    found = gpu_training.fitted(config, torch.device("cuda"))
    held = dry_run(found, 1, 0).memory.total
    print(f"{gib} GiB: {found.model.layers} layers hold {held / 2**30:.1f} GiB")
    assert found.model.layers == layers or (layers is None and 8 < found.model.layers < 32)
    assert 0.97 * gpu_training.FITS * device.total_memory < held <= gpu_training.FITS * device.total_memory


def test_losses_that_a_restore_changes_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "restore_from", lambda *_: None)
    case, *_ = gpu_training.cases(tiny=True)
    with pytest.raises(AssertionError, match="losses after a restore differ"):
        gpu_training.measure(case, torch.device("cpu"), 2, float("inf"), tiny=True)


def test_rows_are_appended_and_may_have_new_columns(tmp_path: Path) -> None:
    file = tmp_path / "measured.csv"
    append(file, [{"case": "a", "ms": 1.5}])
    append(file, [{"case": "b, c", "ms": 2, "more": "x"}])
    assert file.read_text() == 'case,ms,more\na,1.5,\n"b, c",2,x\n'


def test_every_operation_has_its_turn() -> None:
    turns = [case.operation for case in in_turns(kernel_cases("full"))]
    assert sorted(turns[: len(set(turns))]) == sorted(set(turns))
