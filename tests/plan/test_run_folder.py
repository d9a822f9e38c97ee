"""The run folder: found by name, created once, and its files."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from killed import forked
from minka.plan.atomic import check_writable, write_text, writing
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder, find_run, store_of
from minka.plan.store_files import sha256_of

DEEP = "[" * 100_000


def test_a_recipes_name_means_the_recipe_and_a_runs_name_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = load_run("demo", ["run.max_steps=99"]).config
    RunFolder.of(changed).create(changed, {})
    assert load_run("demo").config.run.max_steps != 99
    assert load_run("runs/demo").config == changed
    assert find_run("demo").config() == changed


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="minka train demo"):
        find_run("mine")
    config = load_run("demo").config
    RunFolder.of(config).create(config, {})
    with pytest.raises(UserError, match="runs here: demo"):
        find_run("mine")


@pytest.mark.parametrize("text", [DEEP, "[]", '{"code": "x"}', "{cut", "5", ""])
def test_an_exit_reason_that_says_nothing_is_no_end(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.exit_file.write_text(text)
    assert not folder.finished()


@pytest.mark.parametrize("text", [DEEP, "[]", '{"data": 5}', "{cut"])
def test_a_provenance_that_cannot_be_read_is_reported(text: str, tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.create(config, {})
    folder.provenance_file.write_text(text)
    for read in (lambda: folder.check_data(tmp_path, "d" * 64), lambda: store_of(folder)):
        with pytest.raises(UserError) as caught:
            read()
        assert caught.value.where == str(folder.provenance_file)


def test_a_different_token_store_is_refused_with_both_hashes(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.create(config, {"data": {"manifest_sha256": "a" * 64}})
    folder.check_data(tmp_path, "a" * 64)
    with pytest.raises(UserError, match="aaaaaaaa then, bbbbbbbb now") as caught:
        folder.check_data(tmp_path, "b" * 64)
    assert caught.value.where == str(tmp_path)


def test_the_start_of_training_writes_the_configuration_and_removes_the_exit_reason(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.create(config, {})
    folder.exit_file.write_text('{"code": 0}')
    assert folder.finished()
    longer = load_run("demo", [f"run.folder={tmp_path}", "run.max_steps=9999"]).config
    folder.training_starts(longer)
    assert not folder.finished()
    assert folder.config() == longer


def test_a_run_that_never_began_is_created_again_as_it_is_asked_for_now(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.create(config, {"time": 1}, [{"run": "base", "step": 3}])
    folder.ledger_file.touch()  # opened, and then there was nothing to start from
    other = load_run("demo", [f"run.folder={tmp_path}", "run.seed=5"]).config
    assert not folder.begun()
    folder.create(other, {"time": 2})
    assert (folder.config(), folder.lineage()) == (other, [])
    assert json.loads((folder.path / "provenance.json").read_text()) == {"time": 2}
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert folder.begun()


def test_lineage_is_written_with_the_run(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    assert folder.lineage() == []
    folder.create(config, {}, [{"run": "base", "step": 3}])
    assert folder.lineage() == [{"run": "base", "step": 3}]
    assert json.loads(folder.lineage_file.read_text())["format"] == 1
    for text in ("[]", "{cut", DEEP):
        folder.lineage_file.write_text(text)
        with pytest.raises(UserError) as caught:
            folder.lineage()
        assert caught.value.where == str(folder.lineage_file)


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "precious.txt").write_text("mine")
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    with pytest.raises(UserError, match="not empty"):
        RunFolder.of(config).create(config, {})
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("full", [False, True])
def test_a_creation_that_is_killed_at_any_change_of_the_disk_is_finished_by_the_next(
    full: bool, tmp_path: Path
) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder, whole = RunFolder.of(config), ["lineage.json", "logs", "provenance.json", "run.toml"]

    def create(time: int = 1) -> None:
        folder.create(config, {"time": time}, [{"run": "base"}])

    for moment in range(1, 100):
        if not forked(create, moment, tmp_path, full=full):
            break
        assert not folder.begun()
        if moment % 2 and folder.path.exists():  # an earlier version gave half a file this name
            (folder.path / ".provenance.json.0a1b2c3d4e5f").write_text("{")
        create(moment)
        assert sorted(path.name for path in folder.path.iterdir()) == whole, moment
        assert json.loads(folder.provenance_file.read_text()) == {"time": moment}
        assert folder.config() == config
        shutil.rmtree(folder.path)
    assert 4 < moment < 100


@pytest.mark.parametrize(
    "before",
    [
        ["provenance.json"],
        ["provenance.json", "lineage.json", "logs/x"],
        [".run.toml.0a1b2c3d4e5f", "logs/x"],
        ["logs/torchrun/attempt_0/0/stderr.log", "slurm-123.out", "job.sh", "train.err"],
        ["STOP"],
        ["ledger.jsonl"],
        ["checkpoints/"],
    ],
)
def test_a_folder_with_what_precedes_a_run_becomes_the_runs(before: list[str], tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    for name in before:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).mkdir() if name.endswith("/") else (folder.path / name).touch()
    folder.check_free()
    folder.create(config, {"time": 1})
    assert folder.config() == config
    assert all((folder.path / name).exists() for name in before if "lineage" not in name and not name.startswith("."))


@pytest.mark.parametrize("before", ["precious.txt", "ledger.jsonl", "checkpoints/step-00000001/x", "evals/x", ".git/x"])
def test_a_folder_that_holds_more_than_precedes_a_run_is_refused_by_name(before: str, tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    (folder.path / before).parent.mkdir(parents=True)
    (folder.path / before).write_text("mine")
    with pytest.raises(UserError, match=f"holds {before.split('/')[0]}|but {before.split('/')[0]}"):
        folder.check_free()
    with pytest.raises(UserError):
        folder.create(config, {})
    assert [path for path in folder.path.rglob("*") if path.is_file()] == [folder.path / before]


def test_a_store_that_is_gone_is_said(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.create(config, {"data": {"store": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match=r"gone.*manifest.json"):
        store_of(folder)


def test_a_store_of_the_same_name_in_a_different_project_is_not_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours" / "stores" / "x", tmp_path / "theirs" / "stores" / "x"
    for store, eod in ((ours, 1), (theirs, 2)):
        store.mkdir(parents=True)
        (store / "manifest.json").write_text(json.dumps({"eod": eod}))
    config = load_run("demo", [f"run.folder={tmp_path / 'ours' / 'runs'}", "data.store=stores/x"]).config
    folder, sha256 = RunFolder.of(config), sha256_of(ours / "manifest.json")
    folder.create(config, {"data": {"store": str(ours), "manifest_sha256": sha256}})  # before `base` was recorded
    monkeypatch.chdir(tmp_path / "theirs")
    assert store_of(folder).folder == ours
    assert store_of(folder).eod == 1
    folder.provenance_file.write_text(json.dumps({"data": {"store": str(ours), "manifest_sha256": "0" * 64}}))
    with pytest.raises(UserError, match="not the token store that the run began with"):
        store_of(folder)  # no store is the recorded one
    (theirs / "manifest.json").unlink()
    (ours / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"ln -s ITS_FOLDER \S*stores/x"):
        store_of(folder)


def test_errors_of_writing_say_where_and_what_would_help(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"cannot be written.*file is a file: ") as caught, writing(file / "below"):
        (file / "below").mkdir()
    assert "run.folder" in caught.value.remedy
    for number, said, unsaid in (
        (errno.ENOSPC, "free some space", "may not"),
        (errno.EROFS, "may not be written", "free"),
        (errno.EACCES, "may not be written", "free"),
    ):
        with pytest.raises(UserError, match=said) as caught, writing(tmp_path):
            raise OSError(number, "no", str(file))
        assert unsaid not in str(caught.value)
    with pytest.raises(UserError, match=r"make the folder .*none, or") as caught, writing(tmp_path / "none/below"):
        write_text(tmp_path / "none/below", "")
    (tmp_path / "link").symlink_to(tmp_path / "gone/away")
    with pytest.raises(UserError, match="cannot be written") as caught, writing(tmp_path / "link"):
        (tmp_path / "link").open("w")
    assert f"folder {tmp_path}," not in str(caught.value)  # which is there
    with pytest.raises(UserError) as caught, writing(Path("/proc/ours")):  # where nobody can make a file
        write_text(Path("/proc/ours"), "")
    assert caught.value.where == "/proc/ours"  # and not the temporary file's name
    with pytest.raises(UserError) as caught, writing(Path("/proc")):
        check_writable(Path("/proc"))
    assert caught.value.where == "/proc"
