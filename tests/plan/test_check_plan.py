"""`minka plan check` on runs' folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from measured_runs import learning_run
from minka.plan.command import main


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["check", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_that_reaches_its_target_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = learning_run(tmp_path, "well")
    found = checked(capsys, run, "--loss", "2.2")
    assert found["action"] == "continue"
    assert found["forecast"]["low"] <= 2.2 <= found["forecast"]["high"] * 1.01
    assert (found["tokens"], found["tokens_of_the_run"]) == (500 * 262_144, 1000 * 262_144)
    assert found["days_left"] == pytest.approx(500 * 262_144 / 1e6 / 86_400)
    assert main(["check", run, "--loss", "2.2"]) == 0
    assert "in reach" in capsys.readouterr().out


def test_a_run_that_cannot_reach_it_is_probed_while_it_is_stable_and_then_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stable = learning_run(tmp_path, "stable")
    actions = {checked(capsys, stable, "--loss", f"{loss}")["action"] for loss in (2.1, 2.0, 1.95, 1.9, 1.6)}
    assert actions == {"continue", "probe", "stop"}
    assert (
        checked(capsys, learning_run(tmp_path, "linear", "schedule.kind=constant"), "--loss", "1.8")["action"] == "stop"
    )
    assert checked(capsys, stable, "--loss", "1.6", "--earliest", "0.9")["action"] == "continue"


def test_the_law_says_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, learning_run(tmp_path, "law"), "--law", "epoch")
    assert found["target_source"] == "law 'epoch'"
    assert 4.2 < found["target"] < 4.4  # 123M weights, 262M tokens


def test_the_plan_of_the_run_is_held_against_its_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = learning_run(tmp_path, "speed")
    (Path(run) / "plan.json").write_text(json.dumps({"tokens_per_second_per_gpu": 2e6, "world": 1}))
    assert checked(capsys, run, "--loss", "2.2")["tokens_per_second_planned"] == 2e6
    assert main(["check", run, "--loss", "2.2"]) == 0
    assert "50% of it" in capsys.readouterr().out


def test_early_runs_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(capsys, learning_run(tmp_path, "early", share=0.011), "--loss", "1.0")["action"] == "continue"


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "--loss"), (["--loss", "-1"], "above 0"), (["--law", "none"], "epoch"), (["--loss", "nan"], "above 0")],
)
def test_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", learning_run(tmp_path, "one"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_is_not_there_or_has_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none"), "--loss", "2"]) == 2
    capsys.readouterr()
    assert main(["check", learning_run(tmp_path, "new", share=0.0), "--loss", "2"]) == 2
    assert "has not trained" in capsys.readouterr().err
