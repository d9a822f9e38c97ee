"""`minka plan`: what a model counts, what a run needs and takes, and which layout is fastest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, print_table, run_app
from minka.plan.command_budget import add_budget, add_cadence, add_check, add_fit, add_ladder, add_score

RUN = typer.Argument(help="a recipe, run.toml or run folder")
OVERRIDES = typer.Argument(help="section.key=value")
WORLD = typer.Option(min=1, help="ranks")
GPU = typer.Option(help="a GPU's name, such as H100-SXM, or a file that describes a cluster (docs/plan.md)")
RATES = typer.Option(metavar="FILE", help="what `minka plan calibrate` wrote; default: tabulated rates")
PLOT = typer.Option(metavar="FILE", help="draw it: .png, .svg or .html")
JSON = typer.Option("--json", help="print one JSON document on stdout")
HELP = """Plan a run, on a laptop, before anything is bought.

\b
minka plan model --recipe llama3-8b          weights, and FLOPs a token
minka plan model --hf FOLDER --seq 8192      of any Hugging Face decoder
minka plan memory llama3-8b --world 64 --gpu H100-SXM   what a rank holds
minka plan time llama3-8b --world 64 --gpu H100-SXM     a step, days, dollars
minka plan layout llama3-70b --world 256 --gpu H100-SXM the fastest that fits
minka plan calibrate runs/one runs/two -o rates.toml    rates from measured runs
minka plan budget --days 30 --gpu H100-SXM --gpus 64     what to train with it
minka plan ladder --flops 1e21 --emit FOLDER small runs that tell a large one's size
minka plan fit ladder.csv                    a law of the loss from own runs
minka plan cadence --gpus 1024 --save-seconds 20  how often to save
minka plan check runs/one --law own.toml     will it reach its loss?
minka plan score runs/*                      plans against what came of them
minka plan explain training_flops_per_token.palm
"""


def main(argv: Sequence[str]) -> int:
    """Run `minka plan`."""
    app = new_app(HELP)
    for add in (_add_model, _add_memory, _add_time, _add_layout, _add_calibrate):
        add(app)
    for add in (add_budget, add_fit, add_ladder, add_cadence, add_check, add_score, _add_explain):
        add(app)
    return run_app(app, argv, "minka plan")


def _add_model(app: typer.Typer) -> None:
    @app.command()
    def model(
        words: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="SIZE=N",
                help="layers=32 d_model=4096 heads=32 d_ff=14336 ...; of a recipe section.key=value",
            ),
        ] = None,
        hf: Annotated[
            Path | None, typer.Option(metavar="FILE", help="a Hugging Face config.json or its folder")
        ] = None,
        recipe: Annotated[str, typer.Option(help="a recipe, run.toml or run folder")] = "",
        seq: Annotated[
            int | None,
            typer.Option(
                min=1, help="tokens in a sequence; default: all positions of --hf, data.seq_len of --recipe, else 2048"
            ),
        ] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Weights and training FLOPs a token of a model: sizes, a Hugging Face config or a recipe."""
        from minka.plan.errors import UserError
        from minka.plan.model_plan import model_lines, of_config, of_recipe, of_words

        if bool(hf) + bool(recipe) + bool(words and not recipe) != 1:
            what = "give one model: sizes, --hf or --recipe"
            raise UserError(what, where="minka plan model", remedy="`minka plan model --recipe llama3-8b`, for example")
        if hf:
            found = of_config(hf, seq)
        else:
            found = of_recipe(recipe, words or [], seq) if recipe else of_words(words or [], seq)
        if as_json:
            print_json(found)
        else:
            print_table(model_lines(found))
        return 0


def _add_memory(app: typer.Typer) -> None:
    @app.command()
    def memory(
        run: Annotated[str, RUN],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        world: Annotated[int, WORLD] = 1,
        gpu: Annotated[str, typer.Option(help="a GPU's name, such as H100-SXM, or a file: does it fit?")] = "",
        plot: Annotated[Path | None, PLOT] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Bytes of a rank at its peak, by kind, and whether they fit; of a pipeline, at each of its coordinates."""
        from minka.plan.memory_plan import memory_lines, memory_notes, memory_plan
        from minka.plan.plot import check_plot, plot_memory

        if plot:
            check_plot(plot)
        found = memory_plan(run, overrides or [], world, gpu)
        if plot:
            plot_memory(found, plot)
        if as_json:
            print_json(found)
        else:
            print_table(memory_lines(found))
            print("\n".join(memory_notes(found)))
        return 0


def _add_time(app: typer.Typer) -> None:
    @app.command()
    def time(
        run: Annotated[str, RUN],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        gpu: Annotated[str, GPU] = "",
        world: Annotated[int, WORLD] = 1,
        rates: Annotated[Path | None, RATES] = None,
        price: Annotated[
            float | None, typer.Option("--price-per-gpu-hour", "--dollars", metavar="DOLLARS", help="of a GPU-hour")
        ] = None,
        plot: Annotated[Path | None, PLOT] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Seconds of a step by what they are spent on, tokens a second, MFU, and the run's days and dollars."""
        from minka.plan.plot import check_plot, plot_time
        from minka.plan.time_plan import time_lines, time_of_run

        if plot:
            check_plot(plot)
        found = time_of_run(run, overrides or [], world, _needed(gpu), rates, price)
        if plot:
            plot_time(found, plot)
        if as_json:
            print_json(found)
        else:
            print_table(time_lines(found))
        return 0


def _add_layout(app: typer.Typer) -> None:
    @app.command()
    def layout(
        run: Annotated[str, RUN],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        gpu: Annotated[str, GPU] = "",
        world: Annotated[int, WORLD] = 1,
        top: Annotated[int, typer.Option(min=1, max=100, help="layouts to show")] = 5,
        rates: Annotated[Path | None, RATES] = None,
        plot: Annotated[Path | None, PLOT] = None,
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


def _add_calibrate(app: typer.Typer) -> None:
    @app.command()
    def calibrate(
        runs: Annotated[list[str], typer.Argument(help="folders or names of runs that trained")],
        gpu: Annotated[str, typer.Option(help="what they ran on; default: what their ledgers say")] = "",
        output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="a TOML file")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Fit the cluster's rates to measured runs; `--rates FILE` takes them from there."""
        from minka.plan.calibrate_runs import calibrate_lines, calibrate_plan

        found = calibrate_plan(runs, gpu, output)
        if as_json:
            print_json(found)
        else:
            print_table(calibrate_lines(found))
        return 0


def _add_explain(app: typer.Typer) -> None:
    @app.command()
    def explain(
        key: Annotated[str, typer.Argument(help="a key of a plan's JSON; a key below another with a dot")],
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Formula, inputs and source of a number in a plan."""
        from minka.plan.explain import explain as explained

        found = explained(key)
        if as_json:
            print_json({"key": key, **found._asdict()})
        else:
            print_table([[key, ""], *([f"  {name}", value] for name, value in found._asdict().items())])
        return 0


def _needed(gpu: str) -> str:
    if gpu:
        return gpu
    from minka.plan.errors import UserError

    remedy = "add --gpu H100-SXM, or --gpu machine.toml (`minka doctor --machine machine.toml` writes this machine's)"
    raise UserError("on what it runs is missing", where="--gpu", remedy=remedy)
