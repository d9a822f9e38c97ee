"""What a person sees of a run: its first step at once, how long it will take, and how often it reads its data."""

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from families import said
from minka.data.prepare import open_or_prepare
from minka.kernels.choose import Kernels
from minka.plan.epochs import describe_epochs
from minka.plan.load_config import dump_toml
from minka.train.announce import announce
from minka.train.command import main
from minka.train.console import rounded_up
from minka.train.metrics import Metrics
from minka.train.state import State
from saved import ALONE
from tiny import tiny


def test_the_first_step_is_printed_at_once_and_the_time_left_once_it_is_known(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 10}, tracking={"log_every": 4})
    lines = [line.split() for line in said(config).splitlines() if line.startswith("step ") and "loss" in line]
    assert [line[1].split("/")[0] or line[2].split("/")[0] for line in lines] == ["1", "4", "8", "10"]
    assert ["left" in line for line in lines] == [False, True, True, False]  # after warming up; until the end
    for line in lines[1:3]:
        assert line[line.index("left") - 1] == "s"
        assert 1 <= int(line[line.index("left") - 2]) < 60


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_that_compiles_says_so_before_its_first_step(compiled: bool, tmp_path: Path) -> None:
    config, lines = tiny(tmp_path, kernels={"compile": compiled}), list[str]()
    split = SimpleNamespace(n_tokens=1000, n_documents=1)
    store = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(notes=()), split=lambda _: split)
    console = SimpleNamespace(say=lines.append)
    record: Any = SimpleNamespace(config=config, event=lambda *_, **__: None, console=console, store=store, lineage=[])
    engine: Any = SimpleNamespace(mesh=ALONE, kernels=Kernels())
    announce(record, State(), engine, {})
    assert any(line.startswith("compiling the blocks") for line in lines) == compiled


def test_the_time_left_follows_from_the_tokens_of_the_newest_readings(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100}, data={"batch_warmup": []})
    batch = config.data.batch_tokens
    metrics = Metrics(config, ALONE, State())
    metrics._readings = deque([(50.0, State(step=1, tokens=batch))])
    assert metrics.seconds_left() is None
    metrics._readings.append((60.0, State(step=11, tokens=11 * batch)))
    metrics._readings.append((90.0, State(step=21, tokens=21 * batch)))  # an evaluation took 20 of the 30 seconds
    assert metrics.seconds_left() == pytest.approx(79 * 40 / 20)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1, "1 s"),
        (15, "15 s"),
        (59, "59 s"),
        (59.5, "0:01"),
        (60, "0:01"),
        (61, "0:02"),
        (3600, "1:00"),
        (90_061, "25:02"),
    ],
)
def test_a_time_is_in_rounded_up(seconds: float, text: str) -> None:
    assert rounded_up(seconds) == text


@pytest.mark.parametrize(("tokens", "warned"), [(10, False), (400, False), (401, True)])
def test_more_than_four_epochs_are_warned_of(tokens: int, warned: bool) -> None:
    assert ("beyond 4 epochs" in describe_epochs(tokens, 100)) == warned


def test_epochs_are_said_by_a_dry_run_once_there_is_a_store_and_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, run={"max_steps": 200})
    file = tmp_path / "run.toml"
    file.write_text(dump_toml(config))
    found = []
    for _ in range(2):
        assert main([str(file), "--dry-run", "--json"]) == 0
        epochs = json.loads(capsys.readouterr().out)["derived"]["epochs"]
        assert main([str(file), "--dry-run"]) == 0
        found.append((epochs, "training tokens" in capsys.readouterr().out))
        stored = open_or_prepare(config, Path()).split("train").n_tokens
    assert found == [(None, False), (pytest.approx(config.total_tokens / stored), True)]
    assert config.total_tokens > 4 * stored
