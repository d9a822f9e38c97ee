"""`--plot FILE`: a plan as stacked bars, as .png, .svg or .html."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from minka.plan.atomic import writing
from minka.plan.errors import UserError
from minka.plan.layout_plan import settings_text

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
    from io import StringIO

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
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=min(6, max(1, len(kinds))), frameon=False)
    with writing(path, "choose a different file (--plot)"):
        if path.suffix == ".html":
            picture = StringIO()
            figure.savefig(picture, format="svg")
            path.write_text(PAGE.format(title=escape(title), picture=picture.getvalue()), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)
