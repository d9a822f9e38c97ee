"""Whatever a user gets wrong is one paragraph and the right exit status, with nothing lost and no traceback."""

import json
from pathlib import Path

import pytest

from commands import minka, written
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.run import RunFolder
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


def test_no_corpus(tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"paths": [str(tmp_path / "missing")]})
    assert "missing" in refused(config)


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = tiny(tmp_path, data={"paths": [str(tmp_path / "empty")]})
    assert str(tmp_path / "empty") in refused(config)


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
    assert "at least one rank" in refused(tiny(tmp_path), "--ranks", ranks)


def test_ranks_that_do_not_fit_the_layout(tmp_path: Path) -> None:
    assert "needs 4 ranks" in refused(tiny(tmp_path, layout={"shard": 4}), "--ranks", "3")


def test_a_vocabulary_the_data_cannot_fill(tmp_path: Path) -> None:
    config = tiny(tmp_path, model={"vocab": 30_000}, data={"tokenizer": "bpe"})
    assert "30000" in refused(config).replace(",", "")


def test_a_run_of_that_name_with_another_configuration(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 1}, schedule={"warmup": 0})
    assert minka("train", str(written(config)), "--ranks", "1").returncode == 0
    before = {p: p.read_bytes() for p in RunFolder.of(config).path.rglob("*") if p.is_file()}
    assert "run.seed is 7 there and 8 here" in refused(config, "run.seed=8")
    assert before == {p: p.read_bytes() for p in RunFolder.of(config).path.rglob("*") if p.is_file()}


def test_a_disk_that_is_full_when_the_run_is_created(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert minka("data", "prepare", str(written(config))).returncode == 0
    blocked = tiny(tmp_path, run={"folder": str(tmp_path / "corpus" / "000.txt" / "runs")})  # below a file
    assert "cannot be written" in refused(blocked)


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
