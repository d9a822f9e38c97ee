"""Whatever a user gets wrong is one paragraph and the right exit status, with nothing lost and no traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, minka, written
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder
from minka.train.command import main
from tiny import tiny


def refused(config: RunConfig, *arguments: str) -> str:
    """What `minka train` says on stderr; asserts that it refused, in one paragraph, and left no run behind."""
    existed = RunFolder.of(config).path.exists()
    done = minka("train", str(written(config)), *arguments)
    assert done.returncode == ExitStatus.REFUSED, done.stderr
    assert "Traceback" not in done.stderr
    assert RunFolder.of(config).path.exists() == existed
    paragraphs = [line for line in done.stderr.splitlines() if line.startswith("minka: ")]
    assert len(paragraphs) == 1, done.stderr
    return paragraphs[0]


@pytest.mark.slow
def test_no_corpus(tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"paths": [str(tmp_path / "missing")]})
    assert "missing" in refused(config)


@pytest.mark.slow
def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = tiny(tmp_path, data={"paths": [str(tmp_path / "empty")]})
    assert str(tmp_path / "empty") in refused(config)


@pytest.mark.slow
def test_invalid_utf8(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    (tmp_path / "corpus" / "bad.txt").write_bytes(b"fine until here \xff\xfe")
    message = refused(config)
    assert "bad.txt" in message
    assert "16" in message  # where in the file


def test_unknown_key_names_its_nearest_match(tmp_path: Path) -> None:
    assert "did you mean optimizer.learning_rate" in refused(tiny(tmp_path), "optimizer.learning_rte=1")


@pytest.mark.parametrize("ranks", ["0", "-3"])
def test_no_ranks(ranks: str, tmp_path: Path) -> None:
    assert "--ranks" in refused(tiny(tmp_path), "--ranks", ranks)


def test_ranks_that_do_not_fit_the_layout(tmp_path: Path) -> None:
    assert "the layout (shard 4) needs 4 ranks, not 3" in refused(tiny(tmp_path, layout={"shard": 4}), "--ranks", "3")


@pytest.mark.slow
def test_a_vocabulary_the_data_cannot_fill(tmp_path: Path) -> None:
    config = tiny(tmp_path, model={"vocab": 30_000}, data={"tokenizer": "bpe"})
    assert "30000" in refused(config).replace(",", "")


def test_a_run_of_that_name_with_another_configuration(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 1}, schedule={"warmup": 0})
    assert minka("train", str(written(config)), "--ranks", "1").returncode == 0
    before = {p: p.read_bytes() for p in RunFolder.of(config).path.rglob("*") if p.is_file()}
    assert "run.seed = 8 (was 7)" in refused(config, "run.seed=8")
    assert before == {p: p.read_bytes() for p in RunFolder.of(config).path.rglob("*") if p.is_file()}


def test_a_disk_that_is_full_when_the_run_is_created(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert minka("data", "prepare", str(written(config))).returncode == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    full = tiny(tmp_path, run={"folder": str(disk / "runs")})
    command = f"mount -t tmpfs -o size=4k,nr_inodes=4 minka {disk}; dd if=/dev/zero of={disk}/x bs=4k count=1; "
    command += f"{sys.executable} -m minka train {written(full)}"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(namespace, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == ExitStatus.REFUSED, done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_told_of_by_what_is_not_saved(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    saves = {"every_steps": 8, "keep": 9, "export": True}
    config = tiny(tmp_path, run={"folder": str(disk / "runs")}, checkpoint=saves)
    folder = RunFolder.of(config)
    command = f"mount -t tmpfs -o size=700k minka {disk}; "
    command += f"{sys.executable} -m minka train {written(config)} --ranks 1; status=$?; "
    command += f"cat {folder.exit_file} >&2; ls {folder.checkpoints} {folder.path} >&2; exit $status"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(namespace, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == ExitStatus.FAILED, done.stderr
    assert "step 20 could not be written; the newest checkpoint is of step 8" in done.stdout, done.stdout + done.stderr
    assert "for transformers" not in done.stdout
    assert "a rank failed" not in done.stderr
    assert '"code": 1' in done.stderr


def test_help_says_how_to_go_on_and_what_a_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for said in ("run.start_from=", "run.max_steps=", "--replay 120", "85 stopped", "STOP", "docs/configuration.md"):
        assert said in text


def test_a_run_folder_below_a_file(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert minka("data", "prepare", str(written(config))).returncode == 0
    assert "cannot be written" in refused(tiny(tmp_path, run={"folder": str(tmp_path / "corpus" / "000.txt" / "runs")}))


@pytest.mark.slow
def test_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    config = tiny(tmp_path, model={"vocab": 300}, data={"tokenizer": "bpe"})
    assert minka("data", "prepare", str(written(config))).returncode == 0
    file = tmp_path / "store" / "train.bin"
    tokens = bytearray(file.read_bytes())
    tokens[400:402] = (349).to_bytes(2, "little")
    file.write_bytes(tokens)
    done = minka("train", str(written(config)))
    assert done.returncode == ExitStatus.REFUSED, done.stderr
    assert "has token id 349, and model.vocab is 300" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.max_steps=true", "run.max_steps"),
        ("run.max_steps='7'", "run.max_steps"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate"),
        ("guard.hang_seconds=nan", "guard.hang_seconds"),
        ("model.layers=1.5", "model.layers"),
    ],
)
def test_a_value_of_another_type(override: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tiny(tmp_path), override)


def test_a_window_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    assert "--profile" in refused(tiny(tmp_path), "--profile", "5")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_store_made_again_from_other_text(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 2}, schedule={"warmup": 0})
    file = str(written(config))
    assert minka("train", file, "--ranks", "1").returncode == 0
    (RunFolder.of(config).exit_file).unlink()  # as if it had been cut off
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "corpus" / "000.txt").write_text("other text than before")
    assert "not the token store that the run began with" in refused(config, "--ranks", "1")


@pytest.mark.slow
def test_a_stop_file_that_was_left_there(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 2}, schedule={"warmup": 0})
    assert minka("train", str(written(config)), "--ranks", "1").returncode == 0
    RunFolder.of(config).exit_file.unlink()
    RunFolder.of(config).stop_file.touch()
    done = minka("train", str(written(config)))
    assert done.returncode == ExitStatus.NEEDS_PERSON
    assert "STOP" in done.stderr


def test_a_run_that_another_process_trains(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 2}, schedule={"warmup": 0})
    assert minka("train", str(written(config)), "--ranks", "1").returncode == 0
    RunFolder.of(config).exit_file.unlink()
    with RunFolder.of(config).only_writer():
        assert "a different process is training this run" in refused(config)


def test_a_read_only_folder(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"folder": "/proc/minka"}, data={"store": str(tmp_path / "store")})
    done = minka("train", str(written(config)))
    assert done.returncode == ExitStatus.REFUSED
    assert "/proc/minka" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_json_for_machines(tmp_path: Path) -> None:
    done = minka("train", str(written(tiny(tmp_path))), "model.heads=0", "--json")
    assert done.returncode == ExitStatus.REFUSED
    assert json.loads(done.stdout)["status"] == 2
