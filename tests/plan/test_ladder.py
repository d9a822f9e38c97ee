"""Ladders: what they would tell is what fits to such runs tell, and their files are runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minka.plan.command import main
from minka.plan.errors import UserError
from minka.plan.fit_law import Runs, fit_law
from minka.plan.flops import parameters
from minka.plan.ladder_design import cheapest_ladder, cost, points_of, width_of_optimum
from minka.plan.load_config import load_run
from minka.plan.loss_laws import EPOCH, LossLaw


def test_the_interval_is_that_of_fits_to_such_runs() -> None:
    """120 ladders with noise: the spread of their optima is the predicted one, within a quarter."""
    found = cheapest_ladder(EPOCH, 1e20, 0.3, 1e6, 0.003)
    n, d = (np.array(column) for column in zip(*points_of(found.sizes, found.multiples), strict=True))
    clean = EPOCH.E + EPOCH.A / n**EPOCH.alpha + EPOCH.B / d**EPOCH.beta
    random, optima = np.random.default_rng(0), []
    for _ in range(120):
        fitted = fit_law(Runs(n, d, clean * np.exp(random.normal(0, 0.003, len(n)))))
        optima.append(math.log(LossLaw.of("", fitted.numbers.tolist()).optimum(1e20).parameters))
    spread = (np.percentile(optima, 97.5) - np.percentile(optima, 2.5)) / 2
    assert spread == pytest.approx(found.width, rel=0.25)


def test_more_is_asked_and_more_is_spent() -> None:
    found = [cheapest_ladder(EPOCH, 1e21, within, 1e7, 0.003) for within in (0.5, 0.3, 0.2)]
    assert [one.flops for one in found] == sorted(one.flops for one in found)
    for one, within in zip(found, (0.5, 0.3, 0.2), strict=True):
        assert one.width <= math.log1p(within)
        assert one.flops < 1e21
        assert min(one.sizes) >= 1e7
    wider = [*found[0].sizes, found[0].sizes[-1] * 2]
    assert width_of_optimum(EPOCH, 1e21, points_of(wider, found[0].multiples), 0.003) < found[0].width
    assert cost(wider, found[0].multiples) > found[0].flops


def test_what_no_ladder_tells() -> None:
    with pytest.raises(UserError) as refused:
        cheapest_ladder(EPOCH, 1e20, 0.001, 1e7, 0.003)
    assert "can be reached" in str(refused.value)
    with pytest.raises(UserError) as refused:
        cheapest_ladder(EPOCH, 1e12, 0.5, 1e7, 0.003)
    assert "too small" in str(refused.value)


def test_its_files_are_runs_and_branches_begin_where_their_trunk_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ladder"
    assert main(["ladder", "--flops", "1e20", "--emit", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    low, high = found["target_interval"]
    assert low < found["target_parameters"] < high
    assert found["ladder_flops"] == pytest.approx(sum(run["flops"] for run in found["ladder"]))
    designed = cheapest_ladder(EPOCH, 1e20, 0.5, 1e7, 0.003)
    assert found["ladder_flops"] == pytest.approx(designed.flops, rel=0.3)  # architectures are only near their sizes
    assert math.log(high / low) / 2 == pytest.approx(designed.width, rel=0.2)
    for run in found["ladder"]:
        config = load_run(str(folder / f"{run['run']}.toml")).config
        assert run["parameters"] == parameters(config.model)
        assert config.plan.loss == pytest.approx(EPOCH.loss(run["parameters"], run["tokens"]))
        assert config.total_tokens == run["tokens"]
        assert config.eval.every_steps == 0
        assert config.schedule.decay == pytest.approx(0.2 * run["tokens"], rel=0.05)
        if run["start_from"]:
            trunk, step = run["start_from"].removeprefix("runs/").split("@")
            kept = load_run(str(folder / f"{trunk}.toml")).config
            begins = int(step) * config.data.batch_tokens
            assert begins in kept.checkpoint.keep_tokens
            assert begins == run["tokens"] - config.schedule.decay
            assert (kept.model, kept.data, kept.optimizer) == (config.model, config.data, config.optimizer)
    assert main(["ladder", "--flops", "1e20", "--emit", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--flops", "-1"], "--flops"),
        (["--flops", "1e20", "--sizes", "1e6,x"], "not a number"),
        (["--flops", "1e20", "--sizes", "1e6,2e6"], "three"),
        (["--flops", "1e20", "--noise", "0"], "--noise"),
        (["--flops", "1e20", "--sizes", "6e3,9e3,30e3"], "same architecture"),
        ([], "--flops"),
    ],
)
def test_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_small_ladder_is_trained_by_its_script_and_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ladder"
    text = (Path(__file__).parents[2] / "plan/recipes/demo.toml").read_text()
    (tmp_path / "few.toml").write_text(text.replace("[data]", "[data]\nmax_bytes = 400000"))
    words = ["--flops", "1e13", "--sizes", "6e3,13e3,26e3", "--vocab", "256", "--seq", "64"]
    words += ["--data-of", str(tmp_path / "few.toml")]
    assert main(["ladder", *words, "--emit", str(folder)]) == 0
    capsys.readouterr()
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(folder / "ladder.sh")],
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = sorted(map(str, (folder / "runs").iterdir()))
    assert len(runs) == 12
    assert main(["fit", *runs, "--bootstraps", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_used"] == 12
    assert found["residual_rms"] < 0.05
    longer = {run["run"]: run["loss"] for run in found["runs"]}
    assert longer["trunk-0"] < longer["branch-0-5"]
