"""A run, its store and its corpus that were moved together, used from a folder that has nothing to do with them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minka.checkpoint.command import main as export
from minka.data.command import main as data
from minka.eval.command import main as evaluate
from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import current, read_ledger
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.report.command import main as report
from minka.train.command import main as train
from minka.train.parent_run import open_run, pinned_parent
from minka.train.start_or_resume import read_and_check
from ranks import on_ranks
from tiny import tiny, train_rank


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/base and a fork of it, stores/ and corpus/, all named by relative paths."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        relative = {"paths": ["corpus"], "store": ""}
        kept = {"every_steps": 3, "keep": 9}
        flat, named = {"kind": "constant"}, {"name": "base", "folder": "runs", "max_steps": 6}
        base = tiny(folder, run=named, data=relative, schedule=flat, checkpoint=kept)
        fork = {"name": "fork", "folder": "runs", "max_steps": 6, "start_from": "runs/base@3"}
        for config in (base, tiny(folder, run=fork, data=relative)):
            assert on_ranks(train_rank, 1, config) == [ExitStatus.DONE]
    return folder


@pytest.fixture
def moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project at a different place, while the first one is away; the current folder is empty."""
    away = project.rename(project.with_name("away"))
    shutil.copytree(away, tmp_path / "there" / "project")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "there" / "project"
    assert list((tmp_path / "here").iterdir()) == []
    away.rename(project)


def losses(config: RunConfig) -> list[object]:
    events = current(read_ledger(RunFolder.of(config).ledger_file))
    return [event["loss"] for event in events if event["event"] == "step"]


def test_every_command_finds_what_belongs_to_a_run_that_is_named_by_path(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(moved / "runs" / "base")
    assert train([run, "--dry-run"]) == 0
    assert "is finished, at step 6" in capsys.readouterr().out
    assert train([run, "--replay", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == 0
    assert evaluate([f"{run}@3", "--json"]) == 0
    assert str(moved) in json.loads(capsys.readouterr().out)["path"]
    assert export([run, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert data(["verify", run]) == 0
    assert data(["inspect", run, "--sample", "3", "--json"]) == 0
    assert data(["prepare", run]) == 0
    assert "exists already" in capsys.readouterr().out
    assert report([run, str(moved / "runs" / "fork"), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("prepared_again", [False, True])
def test_a_moved_run_resumes_to_the_bits_that_it_would_have_had(prepared_again: bool, moved: Path) -> None:
    if prepared_again:
        shutil.rmtree(moved / "stores")
    longer = load_run(str(moved / "runs" / "base"), ["run.max_steps=9"]).config
    assert on_ranks(train_rank, 1, longer) == [ExitStatus.DONE]
    straight = tiny(moved, run={"name": "straight", "max_steps": 9}, data={"store": ""}, schedule={"kind": "constant"})
    straight = straight.model_copy(update={"data": longer.data})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(moved)
        assert on_ranks(train_rank, 1, straight) == [ExitStatus.DONE]
    assert losses(longer)[6:] == losses(straight)[6:]
    assert len(list((moved / "stores").iterdir())) == 1


def test_a_run_is_trained_from_inside_its_folder(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(moved / "runs" / "base")
        assert RunFolder.of(load_run(".").config).path == moved / "runs" / "base"
        assert train([".", "--dry-run"]) == 0
        assert evaluate([".", "--json"]) == 0


def test_a_fork_finds_its_parent_that_was_moved_with_it_or_left_where_it_was(moved: Path, tmp_path: Path) -> None:
    for fork in (RunFolder(moved / "runs" / "fork"), RunFolder(tmp_path / "alone")):
        if not fork.exists():
            shutil.copytree(moved / "runs" / "fork", fork.path)
            entry = json.loads(fork.lineage_file.read_text())
            entry["parents"][0]["folder"] = str(moved / "runs" / "base")  # as if the parent had begun there
            fork.lineage_file.write_text(json.dumps(entry))
        parent = pinned_parent(fork)
        assert parent is not None
        assert parent.folder.resolve() == moved / "runs" / "base"


def test_a_store_that_was_moved_alone_is_named_and_compared_by_its_hash(moved: Path, tmp_path: Path) -> None:
    (store,) = (moved / "stores").iterdir()
    shutil.move(store, tmp_path / "disk")
    named = load_run(str(moved / "runs" / "base"), ["run.max_steps=9", f"data.store={tmp_path / 'disk'}"]).config
    assert not read_and_check(Job(config=named)).decision.over
    open_run(named)
    with (tmp_path / "disk" / "manifest.json").open("a") as manifest:
        manifest.write(" ")
    with pytest.raises(UserError, match="not the token store that the run began with"):
        open_run(named)
