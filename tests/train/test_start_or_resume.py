"""What `minka train` says before it starts a rank: a dry run says the same, and a refusal says what would work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment
from families import assert_needs_person, copy, refused, stable_phase
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder
from minka.train.command import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; tests that write into it take a copy."""
    return stable_phase(tmp_path_factory)


@pytest.mark.parametrize(
    ("arguments", "step", "finished", "told"),
    [
        ([], 20, True, "is finished, at step 20"),
        (["run.max_steps=25"], 20, False, "resumes from step 20"),
        (["--from-scratch"], 0, False, "restarts at step 0"),
        (["run.name=new"], 0, False, "begins from new weights"),
        (["run.name=new", "run.start_from=base@10"], 0, False, "begins from base at step 10"),
    ],
)
def test_a_dry_run_says_what_would_become_of_the_run_and_touches_nothing(
    arguments: list[str], step: int, finished: bool, told: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in base.path.parent.rglob("*") if path.is_file()}
    assert main([str(base.path), "--dry-run", *arguments]) == 0
    assert f" {told}" in capsys.readouterr().out.splitlines()[1]
    assert main([str(base.path), "--dry-run", "--json", *arguments]) == 0
    start = json.loads(capsys.readouterr().out)["start"]
    assert (start["step"], start["finished"]) == (step, finished)
    assert {path: path.read_bytes() for path in base.path.parent.rglob("*") if path.is_file()} == before


def test_a_dry_run_says_that_the_corpus_is_missing_unless_it_is_not_needed(
    base: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("there")
    for path, missing in ((tmp_path / "nowhere", True), (tmp_path / "a.txt", False)):
        new = [str(base.path), "run.name=new", "data.source=text", f"data.paths={path}", "data.store=", "--dry-run"]
        assert main(new) == 0
        assert (f"data.paths: {path}: there is no such file" in capsys.readouterr().out) == missing
        assert main([*new, "--json"]) == 0
        assert bool(json.loads(capsys.readouterr().out)["start"]["missing_corpus"]) == missing


@pytest.mark.parametrize(("steps", "said"), [(40, "run.max_steps=40"), (10, "")])
def test_a_finished_run_is_as_long_as_it_was_given_whatever_a_recipe_says(
    steps: int, said: str, base: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, ledger = tmp_path / "recipe.toml", base.ledger_file.read_bytes()
    recipe.write_text(base.config_file.read_text().replace("max_steps = 20", f"max_steps = {steps}"))
    assert main([str(recipe)]) == 0
    told = capsys.readouterr().out
    assert f"{base.path} is finished" in told
    longer = f"It ended at run.max_steps=20; to make it as long as the file says: `minka train {base.path} {said}`"
    assert (longer in told) == bool(said)
    assert main([str(recipe), "--dry-run"]) == 0
    assert (
        f"is finished, at step 20{f'; it becomes longer only by {said}' if said else ''}\n" in capsys.readouterr().out
    )
    assert base.ledger_file.read_bytes() == ledger


def test_a_dry_run_of_a_new_run_refuses_a_parent_that_is_not_there(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, str(base.path), "run.name=new", "run.start_from=nobody", "--dry-run")
    assert "'nobody' is neither a run nor a Hugging Face folder" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ranks", "1"], "--ranks"),
        (["--dry-run"], "--dry-run"),
        (["--from-scratch"], "--from-scratch"),
        (["--profile", "1:3"], "--profile"),
        (["run.seed=1", "--dry-run"], "--dry-run, overrides"),
    ],
)
def test_a_replay_takes_nothing_beside_it(
    arguments: list[str], named: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, str(base.path), "--replay", "5", *arguments)
    assert f"--replay: {named} cannot be given" in text


def test_a_run_toml_edited_by_hand_is_refused_with_what_would_work(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.of(copy(base, "edited"))
    started = folder.config_file.read_text()
    folder.config_file.write_text(started.replace("seed = 7", "seed = 8"))
    assert f"set run.seed back in {folder.path}/run.toml" in refused(capsys, str(folder.path))
    folder.config_file.write_text(started)
    assert main([str(folder.path)]) == 0
    assert "set run.seed back" not in refused(capsys, str(folder.path), "run.seed=8")


def test_a_folder_that_may_not_be_written_is_said_so(base: RunFolder) -> None:
    folder = RunFolder.of(copy(base, "readonly"))
    command = f"mount --bind {folder.path} {folder.path} && mount -o remount,bind,ro {folder.path} && "
    command += f"{sys.executable} -m minka train {folder.path} run.max_steps=25"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(namespace, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == ExitStatus.REFUSED, done.stderr
    assert ".lock: cannot be written: Read-only file system. this place may not be written." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refusal_that_needs_a_person_is_the_runs_ending_unless_another_process_trains_it(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.of(copy(base, "stop"))
    before = folder.exit_file.read_bytes()
    folder.stop_file.touch()
    with folder.only_writer():
        refused(capsys, str(folder.path), "run.max_steps=25", status=ExitStatus.NEEDS_PERSON)
    assert folder.exit_file.read_bytes() == before
    refused(capsys, str(folder.path), "run.max_steps=25", "run.seed=8")
    refused(capsys, str(folder.path), "run.max_steps=25", "--dry-run", status=ExitStatus.NEEDS_PERSON)
    assert folder.exit_file.read_bytes() == before
    refused(capsys, str(folder.path), "run.max_steps=25", status=ExitStatus.NEEDS_PERSON)
    assert_needs_person(folder, "a file called STOP", step=20)
