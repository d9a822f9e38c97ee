"""`minka eval` as a user types it: what it writes next to the run's own results, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import as_another_user, environment
from minka.data.prepare import open_or_prepare
from minka.eval.bits_per_byte import Scores
from minka.eval.command import main
from minka.eval.result_file import write_result
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder, store_of
from saved import saved_run
from tiny import tiny

NOBODY = 65534
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
OWN = "heldout@1.json"
SETTINGS = {"max_documents": 0, "window": 32, "stride": 16}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with a checkpoint of step 3 and the result that it wrote itself."""
    found = saved_run(tmp_path, 3)
    write_result(found.evals, 3, 96, scores(SETTINGS), [("one", "two")])
    return found


def scores(settings: dict[str, int]) -> Scores:
    return Scores({"bits_per_byte": 1.5}, {"bits_per_byte": float("nan")}, 4, 100, 104, settings, {})


def results(run: RunFolder) -> dict[str, Any]:
    folder = run.evals / "step-00000003"
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.iterdir())}


def test_different_settings_write_a_file_of_their_own(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(run)
    for _ in range(2):
        assert main([str(run.path), "eval.max_documents=1", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        (other,) = results(run).keys() - {OWN}
        assert other == Path(printed["path"]).name
        assert results(run)[OWN] == before[OWN]
        written = results(run)[other]
        assert written["settings"] == {**SETTINGS, "max_documents": 1}
        assert written["checkpoint"] == str(run.checkpoints / "step-00000003")
        assert (written["documents"], written["step"], written["tokens"]) == (1, 3, 96)
        assert printed["stderr"]["bits_per_byte"] is written["stderr"]["bits_per_byte"] is None  # of one document


def test_equal_settings_replace_the_result_and_keep_its_samples(run: RunFolder) -> None:
    assert main([f"{run.config_file}@3", "eval.batch_sequences=3"]) == 0
    (found,) = results(run).values()
    assert found["scores"]["bits_per_byte"] != 1.5
    assert found["samples"] == [{"prompt": "one", "text": "two"}]


def test_prompts_are_continued_and_printed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path), 'eval.prompts=["w1"]', "eval.sample_tokens=3"]) == 0
    (sample,) = results(run)[OWN]["samples"]
    assert sample["prompt"] == "w1"
    said = capsys.readouterr().out
    assert f"'w1' -> {sample['text']!r}" in said
    assert "nan" not in said  # the error of a mean over too few documents


@pytest.mark.parametrize("old", ["{}", "[]", "cut o"])
def test_a_result_that_cannot_be_read_is_replaced(old: str, run: RunFolder) -> None:
    own = run.evals / "step-00000003" / OWN
    own.write_text(old)
    write_result(run.evals, 3, 96, scores(SETTINGS), [])
    assert json.loads(own.read_text())["settings"] == SETTINGS
    assert len(list(own.parent.iterdir())) == 1


def test_a_run_that_evaluates_a_step_again_has_only_its_new_samples(run: RunFolder) -> None:
    write_result(run.evals, 3, 96, scores(SETTINGS), [])
    assert results(run)[OWN]["samples"] == []


@pytest.mark.parametrize("override", ["data.seq_len=64", "model.layers=1", "run.seed=3", "nonsense"])
def test_only_settings_of_the_evaluation_may_be_overridden(
    override: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(run)
    assert main([str(run.path), override]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert override in errors
    assert "eval.max_documents" in errors
    assert results(run) == before


def test_a_folder_that_cannot_be_written_is_one_paragraph_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path, 3)
    run.evals.touch()  # stands for a folder without write permission, which root does not have
    monkeypatch.setattr("minka.eval.score_checkpoint.bits_per_byte", pytest.fail)
    assert main([str(run.path)]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert "cannot be written" in errors
    assert errors.count("\n") == 1


def test_a_disk_that_fills_during_the_work_is_one_paragraph(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minka.eval.result_file.write_json", full)
    assert main([str(run.path)]) == ExitStatus.REFUSED
    assert "No space left" in capsys.readouterr().err


def test_different_settings_do_not_take_the_runs_own_name_even_when_they_come_first(run: RunFolder) -> None:
    for file in (run.evals / "step-00000003").iterdir():
        file.unlink()
    assert main([str(run.path), "eval.max_documents=1"]) == 0
    assert OWN not in results(run)
    assert main([str(run.path)]) == 0
    assert results(run)[OWN]["settings"] == SETTINGS


def test_a_result_goes_to_the_named_file_and_nothing_into_the_run(run: RunFolder, tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    before, output = files(), tmp_path / "scores.json"
    for documents in (1, 2):
        assert main([str(run.path), f"eval.max_documents={documents}", "--output", str(output)]) == 0
        assert json.loads(output.read_text())["documents"] == documents
    assert files() == before


def test_a_different_store_in_the_place_of_the_runs_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(run).folder
    before = results(run)
    shutil.rmtree(store)
    open_or_prepare(tiny(tmp_path, data={"store": str(store), "validation_fraction": 0.3}), tmp_path)
    assert main([str(run.path)]) == ExitStatus.REFUSED
    assert f"{store}: this is not the token store that the run began with" in capsys.readouterr().err
    assert results(run) == before


@pytest.mark.parametrize("output", ["scores.txt", "missing/scores.json"])
def test_a_file_that_cannot_be_the_result_is_refused_before_the_work(
    output: str, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run.path), "--output", str(tmp_path / output)]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert "--output" in errors
    assert "MiB" not in errors  # no disk is full


def test_the_newest_checkpoint_is_not_what_an_empty_step_names(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{run.path}@"]) == ExitStatus.REFUSED
    assert "no step follows the @" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_somebody_else_is_scored_and_exported_without_writing_into_it(tmp_path: Path) -> None:
    rights, run, own = as_another_user(), saved_run(tmp_path, 3), tmp_path / "own"
    own.mkdir()
    for path in [run.path, *run.path.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)

    def as_another(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [*rights, sys.executable, "-m", "minka", *arguments]
        return subprocess.run(command, cwd=own, env=environment(), **CAPTURED, check=False)

    refused = as_another("eval", str(run.path))
    assert refused.returncode == ExitStatus.REFUSED, refused.stderr
    assert "may not be written" in refused.stderr
    assert "--output FILE.json" in refused.stderr
    assert as_another("eval", str(run.path), "--output", "scores.json").returncode == 0
    assert as_another("export", str(run.path), "exported").returncode == 0
    assert {path.name for path in own.iterdir()} >= {"scores.json", "exported"}
    assert not run.evals.exists()
