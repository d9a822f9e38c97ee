"""`minka plan cadence`: what it prints, keeps, and refuses."""

import json
from typing import Any

import pytest

from minka.plan.command import main


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["cadence", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_published_case(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "16384", "--mtbf-hours", "3.09", "--step-seconds", "11.5", "--evaluation-seconds", "60"]
    found = planned(capsys, *words)
    assert (round(found["young_seconds"]), round(found["daly_seconds"])) == (667, 654)
    assert found["interval_seconds"] == found["interval_steps"] * 11.5 == pytest.approx(654, abs=6)
    assert found["ettr"] + sum(found["lost"].values()) == pytest.approx(1)
    assert found["ettr"] == pytest.approx(0.892, abs=5e-4)
    assert found["evaluation_interval_seconds"] == 6000
    assert found["evaluation_interval_steps"] == 522
    assert found["keep"]["newest"] == 3
    assert planned(capsys, "--gpus", "16384", "--rate", "llama3")["hours_between_failures"] == pytest.approx(
        3.09, abs=0.01
    )


def test_what_to_keep_follows_the_interval_and_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--gpus", "8", "--mtbf-hours", "0.5", "--step-seconds", "60", "--run", "dense-125m")
    assert found["keep"]["newest"] > 100 / found["interval_steps"]  # a rewind of 100 steps is possible
    assert found["keep"]["tokens"] == [pytest.approx(2e9, rel=1e-4)]  # where its decay begins
    assert found["keep"]["bytes"] == found["keep"]["checkpoint_bytes"] * (found["keep"]["newest"] + 2)


def test_for_people_it_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cadence", "--gpus", "64"]) == 0
    assert "a save stalls 20 s, a restart takes 600 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "rsc-3"], "rsc-1"),
        (["--mtbf-hours", "0"], "--mtbf-hours"),
        (["--save-seconds", "1e300"], "--save-seconds"),
        (["--step-seconds", "nan"], "--step-seconds"),
        (["--flush-seconds", "-1"], "--flush-seconds"),
        (["--mtbf-hours", "0.01"], "would train"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cadence", *words]) == 2
    refused = capsys.readouterr()
    assert said in refused.err
    assert refused.out == ""
