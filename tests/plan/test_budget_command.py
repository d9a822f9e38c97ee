"""`minka plan budget` as a command: the situations of docs/plan.md are answered, and their runs can be trained."""

import json
import re
import shlex
from pathlib import Path

import pytest

from measured_runs import table_of_runs
from minka.__main__ import main
from minka.plan.cluster import Cluster, cluster_toml
from minka.plan.load_config import load_run

SITUATIONS = re.findall(r"\| `minka (plan budget .*?)` \|", (Path(__file__).parents[2] / "docs/plan.md").read_text())


def machine() -> Cluster:
    """Two cores of a laptop."""
    return Cluster("laptop", 0.035, 8, 0.01, 0.4, domain=2, host_gpus=2, cores=2)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the files that the situations name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "machine.toml").write_text(cluster_toml(machine()))
    assert main(["plan", "fit", table_of_runs(tmp_path / "runs.csv"), "--bootstraps", "20", "-o", "own.toml"]) == 0
    capsys.readouterr()
    return tmp_path


def test_docs_have_twelve_situations() -> None:
    assert len(SITUATIONS) == 12


@pytest.mark.parametrize("command", SITUATIONS)
def test_each_situation_gives_a_run_that_a_dry_run_takes(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*shlex.split(command), "--emit", "run.toml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    config = load_run("run.toml").config
    assert config.total_tokens == pytest.approx(plan["tokens"], rel=0.02)
    assert config.optimizer.learning_rate == pytest.approx(plan["learning_rate"]["value"], rel=0.01)
    assert len(plan["alternatives"]) > 8
    assert main(["train", "run.toml", "--dry-run"]) == 0
    assert "weight_decay" in capsys.readouterr().out
    if plan["gpu"]:
        assert (
            main(["plan", "memory", "run.toml", "--gpu", gpu_of(command), "--world", f"{plan['gpus']}", "--json"]) == 0
        )
        assert all(rank["fits"] for rank in json.loads(capsys.readouterr().out)["ranks"])
        assert config.checkpoint.every_steps * plan["days"] * 86_400 / plan["schedule"]["steps"] < 86_400


def gpu_of(command: str) -> str:
    return command.split("--gpu ")[1].split()[0]


def test_for_people_it_names_every_law_and_what_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "budget", "--days", "1", "--gpu", "H100-SXM", "--gpus", "8", "--emit", "run.toml"]) == 0
    said = capsys.readouterr().out
    for word in ("chinchilla-1", "10.46T", "nats a token", "8 x H100-SXM", "minka train run.toml --dry-run"):
        assert word in said


def test_its_own_layouts_mfu_is_what_the_time_of_the_run_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--days", "0.01", "--gpu", "machine.toml", "--gpus", "2", "--mfu", "plan", "--emit", "run.toml"]
    assert main(["plan", "budget", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["plan", "time", "run.toml", "--gpu", "machine.toml", "--world", "2", "--json"]) == 0
    time = json.loads(capsys.readouterr().out)
    assert plan["mfu"] == pytest.approx(time["mfu"]["6n"], rel=0.02)
    assert plan["days"] == pytest.approx(0.01, rel=1e-6)
    steps = time["steps"] * time["step_seconds"] / 86_400
    assert steps == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--flops", "1e20", "--mfu", "40"], "0.4"),
        (["--flops", "1e20", "--mfu", "high"], "not a number"),
        (["--flops", "1e20", "--mfu", "plan"], "--gpu"),
        (["--flops", "1e20", "--law", "chinchila-3"], "chinchilla-3"),
        (["--flops", "1e20", "--law", "none.toml"], "none.toml"),
        (["--flops", "1e20", "--gpu", "H10"], "H100"),
        (["--flops", "1e20", "--emit", "run.yaml"], ".toml"),
        (["--flops", "1e20", "--days", "3"], "contradict"),
        (["--flops", "1e20", "--emit", "run.toml", "--data-of", "none"], "none"),
    ],
)
def test_refused(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "budget", *words]) == 2
    refused = capsys.readouterr()
    assert said in refused.err
    assert refused.out == ""
    assert not (here / "run.toml").exists()
