"""`minka plan fit`: a law of the loss from own runs, how sure it is, and whether it foresees expensive runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minka.plan.errors import UserError
from minka.plan.fit_law import Fit, Runs, bootstrap, fit_law, grid_starts, residuals
from minka.plan.fit_runs import LEAST, WHERE, read_runs
from minka.plan.law_file import NAMES, write_law
from minka.plan.loss_laws import LossLaw

SHARE = 95.0  # of an interval, in percent
Chosen = NDArray[np.bool_]
CHEAP = 0.7  # of the runs, by FLOPs: the test of foresight fits these
MAD = 1.4826  # the median of |x| is a standard deviation / this, for normal x


class Choices(NamedTuple):
    """How to fit: see `minka plan fit --help`."""

    drop_highest: int = 0
    drop_outliers: float = 0.0
    bootstraps: int = 400
    seed: int = 42
    full_grid: bool = False
    flops: float | None = None


def fit_plan(given: Sequence[str], choices: Choices, output: Path | None = None) -> dict[str, Any]:
    """Return what the JSON has, and write the law. Raises UserError for runs that cannot be fitted."""
    if choices.flops is not None and not 0 < choices.flops < math.inf:
        raise UserError(f"{choices.flops:g}", where="--flops", remedy="give a number above 0")
    if output and output.suffix != ".toml":
        raise UserError(f"{output} does not end in .toml", where="-o", remedy=f"write -o {output.stem}.toml")
    everything, names = read_runs(given)
    kept = without_highest(everything, choices.drop_highest)
    fitted = fit_law(everything.pick(kept), grid_starts() if choices.full_grid else None)
    if choices.drop_outliers:
        kept = without_outliers(everything, kept, fitted, choices.drop_outliers)
        fitted = fit_law(everything.pick(kept), grid_starts() if choices.full_grid else None)
    runs = everything.pick(kept)
    refits = bootstrap(runs, fitted, choices.bootstraps, choices.seed) if choices.bootstraps else None
    law = law_of(runs, fitted, refits)
    off = residuals(everything, fitted)
    flops = choices.flops or float((6 * runs.parameters * runs.tokens).max())
    found: dict[str, Any] = dict(zip(NAMES, fitted.numbers.tolist(), strict=True))
    found |= {
        "objective": float(fitted.objective),
        "a": law.exponent,
        "rows_used": len(runs.losses),
        "rows_dropped": int((~kept).sum()),
        "outlier_rule": _rule(choices),
        "intervals": _intervals(refits),
        "residual_rms": law.spread,
        "optimum": _optimum(law, flops, refits),
        "foresight": foresight(runs, choices),
        "runs": [
            {"run": name, "parameters": n, "tokens": d, "loss": loss, "residual": r, "used": bool(used)}
            for name, n, d, loss, r, used in zip(names, *(x.tolist() for x in (*everything, off, kept)), strict=True)
        ],
        "file": str(output) if output else None,
        "notes": _notes(runs, law, refits),
    }
    if output:
        write_law(output, law)
    return found


def without_highest(runs: Runs, count: int) -> Chosen:
    """Return which runs are left without the `count` highest losses, as Besiroglu et al. 2024 left out five."""
    kept = np.ones(len(runs.losses), dtype=bool)
    if count:
        kept[np.argsort(runs.losses)[len(runs.losses) - count :]] = False
    if kept.sum() < LEAST:
        what, remedy = f"{int(kept.sum())} runs are left", f"leave out fewer: {LEAST} are needed"
        raise UserError(what, where="--drop-highest", remedy=remedy)
    return kept


def without_outliers(runs: Runs, kept: Chosen, fitted: Fit, most: float) -> Chosen:
    """Return which runs are within `most` robust standard deviations of the law, repeated until none leaves."""
    for _ in range(10):
        off = residuals(runs, fitted)
        middle = np.median(off[kept])
        spread = MAD * float(np.median(np.abs(off[kept] - middle)))
        now = kept & (np.abs(off - middle) <= most * max(spread, 1e-9))
        if now.sum() < LEAST:
            what, remedy = f"{int(now.sum())} runs are left", "raise the number: most runs are not outliers"
            raise UserError(what, where="--drop-outliers", remedy=remedy)
        if (now == kept).all():
            break
        kept = now
        fitted = fit_law(runs.pick(kept), fitted.logs[None])
    return kept


def law_of(runs: Runs, fitted: Fit, refits: Fit | None) -> LossLaw:
    """Return the law, with the spread of the runs about it and its refits."""
    rms = float(np.sqrt(np.mean(residuals(runs, fitted) ** 2)))
    rows = refits.numbers.tolist() if refits else []
    return LossLaw.of("own", fitted.numbers.tolist(), source=f"`{WHERE}`", spread=rms, refits=rows)


def _rule(choices: Choices) -> str:
    rules = []
    if choices.drop_highest:
        rules.append(f"without the {choices.drop_highest} highest losses")
    if choices.drop_outliers:
        rules.append(f"without runs more than {choices.drop_outliers:g} median residuals (x {MAD}) off the law")
    return "; ".join(rules) or "none: every run is used"


def _intervals(refits: Fit | None) -> dict[str, list[float]]:
    if refits is None:
        return {}
    ends = [(100 - SHARE) / 2, (100 + SHARE) / 2]
    numbers = refits.numbers
    a = numbers[:, 4] / (numbers[:, 3] + numbers[:, 4])
    columns = {**dict(zip(NAMES, numbers.T, strict=True)), "a": a}
    return {name: [float(x) for x in np.percentile(column, ends)] for name, column in columns.items()}


def _optimum(law: LossLaw, flops: float, refits: Fit | None) -> dict[str, Any]:
    split = law.optimum(flops)
    found: dict[str, Any] = {"flops": flops, "parameters": split.parameters, "tokens": split.tokens}
    found |= {"loss": law.loss(*split), "parameters_interval": None, "loss_interval": list(law.interval(*split))}
    if refits is not None:
        sizes = [LossLaw.of("", row).optimum(flops).parameters for row in refits.numbers.tolist()]
        found["parameters_interval"] = [float(x) for x in np.percentile(sizes, [(100 - SHARE) / 2, (100 + SHARE) / 2])]
    return found


def foresight(runs: Runs, choices: Choices) -> dict[str, Any] | None:
    """Fit the cheap runs and predict the dear ones. None where too few are cheap."""
    flops = 6 * runs.parameters * runs.tokens
    order = np.argsort(flops, kind="stable")
    count = math.floor(CHEAP * len(order))
    cheap, dear = runs.pick(order[:count]), runs.pick(order[count:])
    if count < LEAST or len(np.unique(cheap.parameters)) < 3 or not len(dear.losses):
        return None
    fitted = fit_law(cheap)
    refits = bootstrap(cheap, fitted, choices.bootstraps, choices.seed) if choices.bootstraps else None
    law = law_of(cheap, fitted, refits)
    off, covered = [], 0
    for size, tokens, loss in zip(*(x.tolist() for x in dear), strict=True):
        off.append(law.loss(size, tokens) / loss - 1)
        low, high = law.interval(size, tokens)
        covered += low <= loss <= high
    return {
        "fitted": count,
        "predicted": len(off),
        "up_to_flops": float(flops[order[count - 1]]),
        "mean_error": float(np.mean(np.abs(off))),
        "largest_error": float(max(off, key=abs)),
        "covered": covered / len(off),
    }


def _notes(runs: Runs, law: LossLaw, refits: Fit | None) -> list[str]:
    notes = []
    strange = [f"{name}={getattr(law, name):.2g}" for name in ("alpha", "beta") if not 0.1 < getattr(law, name) < 1]
    strange += [f"E={law.E:.2g}"] if 0.1 * runs.losses.min() > law.E else []
    if strange:
        notes.append(f"{', '.join(strange)}: unlike every published law; these runs do not fix one")
    ratio = runs.tokens / runs.parameters
    if ratio.max() / ratio.min() < 4:
        notes.append("tokens a weight hardly vary: alpha and beta are told apart only by the sizes")
    if refits is not None:
        numbers = refits.numbers
        spread = np.percentile(numbers[:, 4] / (numbers[:, 3] + numbers[:, 4]), [2.5, 97.5])
        if spread[1] - spread[0] > 0.2:
            notes.append(f"the exponent a is only known to {spread[0]:.2f} to {spread[1]:.2f}: plan more runs")
    return notes


def fit_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people."""
    rows = []
    for name in (*NAMES, "a"):
        low, high = found["intervals"].get(name, (None, None))
        rows.append([name, f"{found[name]:.4g}", "" if low is None else f"95 % of refits: {low:.4g} to {high:.4g}"])
    best = found["optimum"]
    sizes = best["parameters_interval"]
    between = "" if sizes is None else f", 95 % {sizes[0]:.3g} to {sizes[1]:.3g}"
    rows += [
        ["runs", f"{found['rows_used']:,}", f"{found['rows_dropped']:,} left out; {found['outlier_rule']}"],
        ["off by", f"{found['residual_rms']:.2%}", "of the loss, root mean square"],
        ["optimum", f"{best['parameters']:.3g}", f"weights, at {best['flops']:.3g} FLOPs{between}"],
        [
            "  loss",
            f"{best['loss']:.3f}",
            f"90 % of runs {best['loss_interval'][0]:.3f} to {best['loss_interval'][1]:.3f}",
        ],
    ]
    seen = found["foresight"]
    if seen:
        text = f"of {seen['predicted']} expensive runs, from {seen['fitted']} up to {seen['up_to_flops']:.3g} FLOPs"
        rows.append(["foresight", f"{seen['mean_error']:.2%}", f"{text}; {seen['covered']:.0%} within 90 % intervals"])
    if found["file"]:
        rows.append(["written", found["file"], "for --law"])
    return rows
