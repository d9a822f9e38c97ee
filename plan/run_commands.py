"""`minka plan time`, `layout` and `calibrate`: their arguments, and what they print."""

from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import print_json, print_table

RUN = typer.Argument(help="a recipe, run.toml or run folder")
OVERRIDES = typer.Argument(help="section.key=value")
WORLD = typer.Option(min=1, help="ranks")
GPU = typer.Option(help="a GPU's name, such as H100-SXM, or a file that describes a machine (docs/plan.md)")
RATES = typer.Option(metavar="FILE", help="what `minka plan calibrate` wrote; default: tabulated rates")
JSON = typer.Option("--json", help="print one JSON document on stdout")


def add_time(app: typer.Typer) -> None:
    """Add `minka plan time`."""

    @app.command()
    def time(
        run: Annotated[str, RUN],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        gpu: Annotated[str, GPU] = "",
        world: Annotated[int, WORLD] = 1,
        rates: Annotated[Path | None, RATES] = None,
        dollars: Annotated[float | None, typer.Option(metavar="PRICE", help="dollars a GPU-hour")] = None,
        plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it: .png, .svg or .html")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Seconds of a step by what they are spent on, tokens a second, MFU, and the run's days and dollars."""
        from minka.plan.plot import check_plot, plot_time
        from minka.plan.time_plan import time_lines, time_of_run

        if plot:
            check_plot(plot)
        found = time_of_run(run, overrides or [], world, _needed(gpu), rates, dollars)
        if plot:
            plot_time(found, plot)
        if as_json:
            print_json(found)
        else:
            print_table(time_lines(found))
        return 0


def add_layout(app: typer.Typer) -> None:
    """Add `minka plan layout`."""

    @app.command()
    def layout(
        run: Annotated[str, RUN],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        gpu: Annotated[str, GPU] = "",
        world: Annotated[int, WORLD] = 1,
        top: Annotated[int, typer.Option(min=1, max=100, help="layouts to show")] = 5,
        rates: Annotated[Path | None, RATES] = None,
        plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it: .png, .svg or .html")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """The fastest layouts that fit, why the first wins, what its neighbours cost, and what to measure."""
        from minka.plan.layout_plan import layout_lines, layout_notes, layout_plan
        from minka.plan.plot import check_plot, plot_layouts

        if plot:
            check_plot(plot)
        found = layout_plan(run, overrides or [], world, _needed(gpu), rates, top)
        if plot:
            plot_layouts(found, plot)
        if as_json:
            print_json(found)
        else:
            print_table(layout_lines(found))
            print("\n".join(["", *layout_notes(found)]))
        return 0


def add_calibrate(app: typer.Typer) -> None:
    """Add `minka plan calibrate`."""

    @app.command()
    def calibrate(
        runs: Annotated[list[str], typer.Argument(help="folders or names of runs that trained")],
        gpu: Annotated[str, typer.Option(help="what they ran on; default: what their ledgers say")] = "",
        output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="a TOML file")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Fit the machine's rates to measured runs; `--rates FILE` takes them from there."""
        from minka.plan.calibrate_runs import calibrate_lines, calibrate_plan

        found = calibrate_plan(runs, gpu, output)
        if as_json:
            print_json(found)
        else:
            print_table(calibrate_lines(found))
        return 0


def _needed(gpu: str) -> str:
    if gpu:
        return gpu
    from minka.plan.errors import UserError

    remedy = "add --gpu H100-SXM, or --gpu machine.toml (`minka doctor --machine machine.toml` writes this machine's)"
    raise UserError("on what it runs is missing", where="--gpu", remedy=remedy)
