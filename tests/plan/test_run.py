"""The run folder: found by name, opened once, refused when it is another run."""

from pathlib import Path

import pytest

from minka.plan.errors import UserError
from minka.plan.load import load_run
from minka.plan.run import RunFolder, find_run, store_of
from minka.plan.writing import writing


def test_a_recipes_name_means_the_recipe_and_a_runs_name_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = load_run("demo", ["run.max_steps=99"]).config
    RunFolder.of(changed).open(changed, {})
    assert load_run("demo").config.run.max_steps != 99
    assert load_run("runs/demo").config == changed
    assert find_run("demo").config() == changed


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="minka train demo"):
        find_run("mine")
    config = load_run("demo").config
    RunFolder.of(config).open(config, {})
    with pytest.raises(UserError, match="runs here: demo"):
        find_run("mine")


def test_only_what_a_run_is_must_be_equal_not_how_it_is_run(tmp_path: Path) -> None:
    here = f"run.folder={tmp_path}"
    config = load_run("demo", [here]).config
    RunFolder.of(config).open(config, {})
    other = load_run("demo", [here, "layout.micro_batch=4", "tracking.log_every=1", "guard.hang_seconds=9"]).config
    RunFolder.of(other).open(other, {})
    assert RunFolder.of(config).config() == other
    with pytest.raises(UserError, match=r"run.seed is 0 there and 1 here"):
        RunFolder.of(config).check_same(load_run("demo", [here, "run.seed=1"]).config)


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "precious.txt").write_text("mine")
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    with pytest.raises(UserError, match="not empty"):
        RunFolder.of(config).open(config, {})
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["precious.txt"]


def test_a_store_that_is_gone_is_said(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {"data": {"store": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match=r"gone.*manifest.json"):
        store_of(folder)


def test_errors_of_writing_say_where_and_how_much_is_free(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"cannot be written.*MiB are free") as caught, writing(file / "below"):
        (file / "below").mkdir()
    assert "run.folder" in caught.value.remedy
