"""The run folder: found by name, opened once, refused when it is another run."""

import errno
import json
from pathlib import Path

import pytest

from minka.plan.atomic import writing
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import Ledger
from minka.plan.load_config import dump_toml, load_run
from minka.plan.run_folder import RunFolder, find_run, store_of

DEEP = "[" * 100_000


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
    folder = RunFolder.of(config)
    folder.open(config, {})
    log(folder, start(config))
    other = load_run("demo", [here, "layout.micro_batch=4", "tracking.log_every=1", "guard.hang_seconds=9"]).config
    folder.open(other, {})
    assert folder.config() == config  # until training begins
    folder.begin(other)
    assert folder.config() == other
    before = folder.config_file.read_bytes()
    with pytest.raises(UserError, match=r"run.seed is 0 there and 1 here"):
        folder.open(load_run("demo", [here, "run.seed=1"]).config, {})
    assert folder.config_file.read_bytes() == before


def test_a_run_toml_edited_by_hand_does_not_hide_a_change(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {})
    log(folder, start(config))
    edited = load_run("demo", [f"run.folder={tmp_path}", "run.seed=1", "schedule.warmup=3"]).config
    folder.config_file.write_text(dump_toml(edited))
    assert set(folder.changes(folder.config())) == {"run.seed", "schedule.warmup"}
    with pytest.raises(UserError, match=r"run.seed is 0 there and 1 here"):
        folder.open(folder.config(), {})


def test_history_counts_since_the_run_last_began_again(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    assert folder.history() == (0, 0, None)
    folder.open(config, {})
    step: dict[str, object] = {"event": "step", "seconds": {"save": 0.1}}
    log(folder, {"event": "start"}, step, {"event": "save"})
    assert folder.history() == (1, 1, None)  # as version 1 wrote it
    log(folder, start(config), step, {"event": "save"}, step)
    assert folder.history() == (2, 2, config)
    log(folder, {"event": "restart"})
    assert folder.history() == (0, 0, config)
    log(folder, start(config))
    with folder.ledger_file.open("a") as file:
        file.write('{"event": "save", "time"')  # cut off by a crash
    assert folder.history() == (1, 0, config)


def test_history_is_read_past_lines_that_nobody_could_have_written(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {})
    log(folder, start(config))
    with folder.ledger_file.open("a") as file:
        file.write(DEEP + '\n{"event": ["start"], "time": 0, "step": 0, "tokens": 0}\n' + DEEP.replace("[", '{"a":'))
    log(folder, {"event": "save"})
    assert folder.history() == (1, 1, config)
    folder.open(config, {})


@pytest.mark.parametrize("text", [DEEP, "[]", '{"code": "x"}', "{cut", "5", ""])
def test_an_exit_reason_that_says_nothing_is_no_end(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.exit_file.write_text(text)
    assert not folder.finished()


@pytest.mark.parametrize("text", [DEEP, "[]", '{"data": 5}', "{cut"])
def test_a_provenance_that_cannot_be_read_is_said_when_the_run_goes_on(text: str, tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {})
    log(folder, start(config))
    (folder.path / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance\.json: cannot be read"):
        folder.open(config, {})
    with pytest.raises(UserError, match=r"provenance\.json: cannot be read"):
        store_of(folder)


def test_the_beginning_of_training_undoes_the_end_before(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {})
    folder.exit_file.write_text('{"code": 0}')
    assert folder.finished()
    folder.begin(config)
    assert not folder.finished()


def test_a_run_that_never_began_is_made_again_as_it_is_asked_for_now(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    folder.open(config, {"time": 1}, [{"run": "base", "step": 3}])
    folder.ledger_file.touch()  # opened, and then there was nothing to start from
    other = load_run("demo", [f"run.folder={tmp_path}", "run.seed=5"]).config
    assert not folder.begun()
    folder.open(other, {"time": 2})
    assert (folder.config(), folder.lineage()) == (other, [])
    assert json.loads((folder.path / "provenance.json").read_text()) == {"time": 2}
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert folder.begun()


def test_lineage_is_written_with_the_run_and_not_again(tmp_path: Path) -> None:
    config = load_run("demo", [f"run.folder={tmp_path}"]).config
    folder = RunFolder.of(config)
    assert folder.lineage() == []
    folder.open(config, {}, [{"run": "base", "step": 3}])
    log(folder, start(config))
    folder.open(config, {}, [{"run": "other", "step": 4}])
    assert folder.lineage() == [{"run": "base", "step": 3}]
    assert json.loads(folder.lineage_file.read_text())["format"] == 1
    for text in ("[]", "{cut", DEEP):
        folder.lineage_file.write_text(text)
        with pytest.raises(UserError, match=r"lineage\.json"):
            folder.lineage()


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
    for number, said, unsaid in (
        (errno.ENOSPC, "free some space", "may not"),
        (errno.EROFS, "may not be written", "free"),
        (errno.EACCES, "may not be written", "free"),
    ):
        with pytest.raises(UserError, match=said) as caught, writing(tmp_path):
            raise OSError(number, "no", str(file))
        assert unsaid not in str(caught.value)


def start(config: RunConfig) -> dict[str, object]:
    return {"event": "start", "config": config.model_dump(mode="json")}


def log(folder: RunFolder, *events: dict[str, object]) -> None:
    """Lines at the end of the run's ledger."""
    ledger = Ledger(folder.ledger_file)
    for event in events:
        ledger.append(str(event["event"]), step=0, tokens=0, **{k: v for k, v in event.items() if k != "event"})
    ledger.close()
