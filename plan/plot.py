"""`--plot FILE`: a plan as stacked bars, a law over its runs; as .png, .svg or .html."""

from collections.abc import Mapping
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from minka.plan.atomic import writing
from minka.plan.errors import UserError
from minka.plan.layout_plan import settings_text
from minka.plan.loss_laws import LossLaw

KINDS = (".png", ".svg", ".html")
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><body>\n{picture}\n</body></html>\n'


def check_plot(path: Path) -> None:
    """Raise UserError, before anything is computed, for a file that cannot be drawn."""
    if path.suffix not in KINDS:
        raise UserError(
            f"{path.suffix or path.name!r} cannot be drawn", where="--plot", remedy=f"name it {', '.join(KINDS)}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        remedy = "pip install 'minka[plot]'"
        raise UserError("drawing needs matplotlib, which is not installed", where="--plot", remedy=remedy) from None


def plot_time(found: Mapping[str, Any], path: Path) -> None:
    """Draw where the time of a step goes."""
    title = f"a step on {found['world']:,} {found['gpu']}, {found['calibrated']}"
    stacked_bars({"step": found["breakdown_seconds"]}, "seconds", title, path)


def plot_layouts(found: Mapping[str, Any], path: Path) -> None:
    """Draw where the time of the best layouts' steps goes."""
    bars = {}
    for number, one in enumerate(found["layouts"], 1):
        bars[f"{number}: {settings_text(one['layout'])}"] = one["breakdown_seconds"]
    stacked_bars(bars, "seconds", f"the fastest layouts on {found['world']:,} {found['gpu']}", path)


def plot_memory(found: Mapping[str, Any], path: Path) -> None:
    """Draw what each rank holds at its peak."""
    bars = {
        f"rank {rank['rank']:,}": {kind: size / 2**30 for kind, size in rank["peak_bytes_by_kind"].items()}
        for rank in found["ranks"]
    }
    stacked_bars(bars, "GiB", f"memory at the peak, {found['world']:,} ranks", path)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], unit: str, title: str, path: Path) -> None:
    """Draw one bar a row, cut into kinds. Raises UserError where the file cannot be written."""
    check_plot(path)
    from matplotlib.figure import Figure

    kinds = [kind for kind in next(iter(bars.values())) if any(row[kind] > 0 for row in bars.values())]
    figure = Figure(figsize=(10, 1.5 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = list(bars)
    ends = [0.0] * len(names)
    for kind in kinds:
        widths = [bars[name][kind] for name in names]
        axes.barh(names, widths, left=ends, label=kind)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    figure.legend(loc="outside lower center", ncols=min(6, max(1, len(kinds))), frameon=False)
    _save(figure, title, path)


def plot_fit(found: Mapping[str, Any], path: Path) -> None:
    """Draw measured losses over FLOPs with the law's optimum below them, and how far each run is off."""
    from matplotlib.figure import Figure

    law = LossLaw.of("own", [found[name] for name in ("A", "B", "E", "alpha", "beta")])
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for used, marker in ((True, "o"), (False, "x")):
        runs = [run for run in found["runs"] if run["used"] is used]
        if not runs:
            continue
        flops = [6 * run["parameters"] * run["tokens"] for run in runs]
        sizes, label = [run["parameters"] for run in runs], "used" if used else "left out"
        dots = left.scatter(flops, [run["loss"] for run in runs], c=sizes, norm="log", marker=marker, label=label)
        right.scatter(flops, [100 * run["residual"] for run in runs], c=sizes, norm="log", marker=marker, label=label)
        if used:
            figure.colorbar(dots, ax=right, label="weights")
    every = [6 * run["parameters"] * run["tokens"] for run in found["runs"]]
    steps = [min(every) * (10 * max(every) / min(every)) ** (k / 60) for k in range(61)]
    left.plot(steps, [law.loss(*law.optimum(flops)) for flops in steps], label="the best split, by the law")
    right.axhline(0)
    for axes, text in ((left, "loss, nats a token"), (right, "predicted - measured, %")):
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs, 6 N D")
        axes.set_ylabel(text)
        axes.legend(frameon=False)
    _save(figure, f"L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}", path)


def _save(figure: Any, title: str, path: Path) -> None:
    """Write a drawing. Raises UserError where the file cannot be written."""
    figure.suptitle(title)
    with writing(path, "choose a different file (--plot)"):
        if path.suffix == ".html":
            picture = StringIO()
            figure.savefig(picture, format="svg")
            path.write_text(PAGE.format(title=escape(title), picture=picture.getvalue()), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)
