"""The fit finds the law that made the losses, knows how sure it is, and is not led astray by a few wrong runs."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from minka.plan.command import main
from minka.plan.errors import UserError
from minka.plan.fit_law import GRID, HUBER, Fit, Runs, bootstrap, fit_law, grid_starts, residuals
from minka.plan.fit_plan import Choices, fit_plan
from minka.plan.law_file import read_law
from minka.plan.loss_laws import EPOCH, LossLaw

TRUTH = np.array([EPOCH.A, EPOCH.B, EPOCH.E, EPOCH.alpha, EPOCH.beta])


def runs_of(seed: int, count: int = 245, noise: float = 0.0075, law: LossLaw = EPOCH) -> Runs:
    """As Chinchilla's: 57M to 16B weights, 1e18 to 1e22 FLOPs."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.uniform(math.log(57e6), math.log(16e9), count))
    ratio = np.exp(random.uniform(math.log(0.5), math.log(300), count))
    tokens = np.minimum(sizes * ratio, 1e22 / 6 / sizes)
    losses = law.E + law.A / sizes**law.alpha + law.B / tokens**law.beta
    return Runs(sizes, tokens, losses * np.exp(random.normal(0, noise, count)))


def exponent(fitted: Fit) -> float:
    alpha, beta = fitted.numbers[..., 3], fitted.numbers[..., 4]
    return float(beta / (alpha + beta))


def test_a_law_without_noise_is_found() -> None:
    fitted = fit_law(runs_of(0, noise=0.0))
    assert fitted.numbers == pytest.approx(TRUTH, rel=1e-5)
    assert fitted.objective < 1e-12


def test_it_is_the_minimum_that_a_library_finds() -> None:
    """scipy's L-BFGS on the published objective, from where ours ended: there is nothing below."""
    runs = runs_of(1, 60)
    x, y, z = (np.log(one) for one in runs)

    def objective(logs: Any) -> float:
        a, b, e, alpha, beta = logs
        off = np.abs(np.logaddexp.reduce([a - alpha * x, b - beta * y, np.full_like(x, e)]) - z)
        return float(np.where(off <= HUBER, off**2 / 2, HUBER * (off - HUBER / 2)).sum())

    fitted = fit_law(runs)
    assert objective(fitted.logs) == pytest.approx(float(fitted.objective), rel=1e-12)
    for method in ("L-BFGS-B", "Nelder-Mead"):
        found = minimize(objective, fitted.logs, method=method)
        assert found.fun >= fitted.objective * (1 - 1e-9)


@pytest.mark.parametrize("every", [90, pytest.param(1, marks=pytest.mark.slow)])
def test_five_starts_and_the_grid_agree(every: int) -> None:
    assert len(grid_starts()) == math.prod(map(len, GRID)) == 4500
    runs = runs_of(2)
    few, many = fit_law(runs), fit_law(runs, grid_starts()[::every])
    assert few.numbers == pytest.approx(many.numbers, rel=1e-10)


def test_gross_outliers_move_nothing_with_the_rule(tmp_path: Path) -> None:
    clean = runs_of(3)
    spoilt = clean.losses.copy()
    random = np.random.default_rng(3)
    which = random.choice(len(spoilt), len(spoilt) // 10, replace=False)
    spoilt[which] *= random.choice([0.7, 1.5, 3.0], len(which))
    file = tmp_path / "runs.csv"
    rows = zip(clean.parameters, clean.tokens, spoilt, strict=True)
    file.write_text("params,tokens,loss\n" + "\n".join(",".join(map(repr, map(float, row))) for row in rows))
    found = fit_plan([str(file)], Choices(drop_outliers=5.0, bootstraps=0))
    assert found["rows_dropped"] == len(which)
    assert found["a"] == pytest.approx(exponent(fit_law(clean)), abs=0.01)
    assert "more than 5" in found["outlier_rule"]


def coverage(sets: int, draws: int, count: int = 245) -> np.ndarray[Any, Any]:
    """The share of data sets whose 95 % interval has the truth, for each of the five numbers."""
    inside = np.zeros(5)
    for seed in range(sets):
        runs = runs_of(1000 + seed, count)
        refits = bootstrap(runs, fit_law(runs), draws, seed).numbers
        low, high = np.percentile(refits, [2.5, 97.5], axis=0)
        inside += (low <= TRUTH) & (high >= TRUTH)
    return inside / sets


@pytest.mark.slow
def test_intervals_have_the_truth_as_often_as_they_say() -> None:
    found = coverage(400, 100, 60)
    print(f"95 % intervals of 400 data sets: {dict(zip('A B E alpha beta'.split(), found.tolist(), strict=True))}")
    assert (found >= 0.92).all()
    assert (found <= 0.98).all()


def test_intervals_of_few_data_sets() -> None:
    assert (coverage(8, 40, 60) >= 0.6).all()


def test_residuals_have_the_sign_of_the_prediction() -> None:
    runs = runs_of(4, noise=0.0)
    high = runs._replace(losses=runs.losses * 1.01)
    assert residuals(high, fit_law(runs)) == pytest.approx(np.full(245, -math.log(1.01)), abs=1e-6)


def write(path: Path, runs: Runs, tokens: str = "tokens") -> str:
    """A table of them."""
    second = runs.tokens if tokens == "tokens" else 6 * runs.parameters * runs.tokens
    rows = zip(runs.parameters, second, runs.losses, strict=True)
    path.write_text(f"Params, {tokens} ,loss\n" + "\n".join(f"{n!r},{d!r},{x!r}" for n, d, x in map(tuple_of, rows)))
    return str(path)


def tuple_of(row: tuple[Any, ...]) -> tuple[float, ...]:
    return tuple(float(x) for x in row)


@pytest.mark.parametrize("column", ["tokens", "flops"])
def test_the_command_prints_and_writes_a_law(column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, law = write(tmp_path / "runs.csv", runs_of(5), column), tmp_path / "own.toml"
    assert main(["fit", table, "--bootstraps", "40", "-o", str(law), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_used"] == 245
    assert found["A"] > 0
    for name in ("A", "B", "E", "alpha", "beta", "a"):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert found["foresight"]["mean_error"] < 0.01
    assert found["foresight"]["covered"] > 0.7
    again = read_law(law)
    assert (again.A, again.beta, len(again.bootstrap)) == (found["A"], found["beta"], 40)
    assert main(["budget", "--flops", "1e21", "--law", str(law), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["law"] == "own"
    assert plan["loss"] == pytest.approx(EPOCH.loss(plan["parameters"], plan["tokens"]), rel=0.01)
    assert main(["fit", table, "--bootstraps", "0"]) == 0
    assert "runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params,loss\n1,2\n", "tokens or flops"),
        ("tokens,loss\n1,2\n", "params"),
        ("params,tokens,bits_per_byte\n1,2,3\n", "nats"),
        ("params,tokens,loss\n1e6,1e9,nan\n", "line 2"),
        ("params,tokens,loss\n1e6,1e9,2.0\n-1,1e9,2.0\n", "line 3"),
        ("params,tokens,loss\n1e6,1e9,2.0\n1e6,2e9,2.0\n", "2 runs"),
        ("params,tokens,loss\n" + "".join(f"1e6,{n}e9,{4 - n / 10}\n" for n in range(1, 9)), "1 sizes"),
        ("", "params"),
        ("params,tokens,loss\n" + "".join(f"{n}e6,{n}e9,{200 / n}\n" for n in range(1, 9)), "perplexities"),
    ],
)
def test_what_cannot_be_fitted(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        fit_plan([str(file)], Choices())
    assert said in str(refused.value)
    assert refused.value.remedy


def test_other_names_of_columns_and_semicolons_are_read(tmp_path: Path) -> None:
    runs = runs_of(9, 40)
    (tmp_path / "runs.csv").write_text(
        "N;D;L\n" + "\n".join(";".join(map(repr, tuple_of(row))) for row in zip(*runs, strict=True)) + "\n"
    )
    found = fit_plan([str(tmp_path / "runs.csv")], Choices(bootstraps=0))
    assert found["A"] == pytest.approx(float(fit_law(runs).numbers[0]))


@pytest.mark.parametrize(("flops", "file"), [(-3.0, "law.toml"), (math.nan, "law.toml"), (1e20, "law.txt")])
def test_options_of_a_fit_are_checked_before_it(flops: float, file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fit_plan([write(tmp_path / "runs.csv", runs_of(5, 40))], Choices(flops=flops), tmp_path / file)
    assert not (tmp_path / file).exists()


def test_a_missing_file_and_a_law_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fit_plan([str(tmp_path / "none.csv")], Choices())
    (tmp_path / "law.toml").write_text("A = 1.0\n")
    with pytest.raises(UserError) as refused:
        read_law(tmp_path / "law.toml")
    assert "not a law" in str(refused.value)


def test_245_runs_and_400_refits_take_less_than_twenty_seconds_of_a_core() -> None:
    runs = runs_of(6)
    begun = time.process_time()
    bootstrap(runs, fit_law(runs), 400)
    assert time.process_time() - begun < 20


def test_the_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, file = write(tmp_path / "runs.csv", runs_of(7, 40)), tmp_path / "fit.svg"
    assert main(["fit", table, "--bootstraps", "0", "--drop-highest", "3", "--plot", str(file)]) == 0
    assert "left out" in file.read_text()


def test_a_law_that_the_runs_do_not_fix_is_said_to_be_strange(tmp_path: Path) -> None:
    odd = LossLaw.of("odd", [5.0, 6.0, 1e-3, 1.7, 0.05])
    notes = fit_plan([write(tmp_path / "runs.csv", runs_of(8, 40, 0.0, odd))], Choices(bootstraps=0))["notes"]
    assert any("unlike every published law" in note for note in notes)
    assert fit_plan([write(tmp_path / "good.csv", runs_of(8, 40, 0.0))], Choices(bootstraps=0))["notes"] == []
