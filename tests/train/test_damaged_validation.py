"""A validation split that is damaged: refused before training, and in the middle of it no reason to end the run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minka.data.prepare import open_or_prepare
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.train import worker
from minka.train.announce import announce
from tiny import tiny, train_rank


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[10] ^= 128
    file.write_bytes(raw)


def delete(file: Path) -> None:
    file.unlink()


def other_split(file: Path) -> None:
    shutil.copyfile(file.with_stem("train"), file)


def test_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    flip(open_or_prepare(config, tmp_path).folder / "validation.bin")
    with pytest.raises(UserError, match=r"validation\.bin has changed") as caught:
        train_rank(config)
    assert caught.value.status == ExitStatus.REFUSED
    assert "data prepare" in caught.value.remedy


@pytest.mark.parametrize(("damage", "part"), [(flip, "bin"), (delete, "parquet"), (other_split, "idx")])
def test_in_the_middle_of_training_is_recorded_and_training_continues(
    damage: Callable[[Path], None],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(tmp_path, run={"max_steps": 6}, eval={"every_steps": 3})
    file = tmp_path / "store" / f"validation.{part}"

    def announce_then_damage(*arguments: object) -> None:  # the moment after the checks at the start
        announce(*arguments)  # type: ignore[arg-type]
        damage(file)

    monkeypatch.setattr(worker, "announce", announce_then_damage)
    assert train_rank(config) == ExitStatus.DONE
    events = list(read_ledger(RunFolder.of(config).ledger_file))
    failed = [event for event in events if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [3, 6]
    assert all(f"validation.{part}" in event["reason"] for event in failed)
    assert not [event for event in events if event["event"] == "eval"]
    assert f"validation.{part}" in capsys.readouterr().out
    assert [event["step"] for event in events if event["event"] == "save"] == [6]
