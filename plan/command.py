"""`minka plan`: what a model counts, and where each number comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, print_table, run_app
from minka.plan.run_commands import add_calibrate, add_layout, add_time

HELP = """Plan a run, on a laptop, before anything is bought.

\b
minka plan model --recipe llama3-8b          weights, and FLOPs a token
minka plan model --hf FOLDER --seq 8192      of any Hugging Face decoder
minka plan memory llama3-8b --world 64 --gpu H100-SXM   what a rank holds
minka plan time llama3-8b --world 64 --gpu H100-SXM     a step, days, dollars
minka plan layout llama3-70b --world 256 --gpu H100-SXM the fastest that fits
minka plan calibrate runs/one runs/two -o rates.toml    rates from measured runs
minka plan explain training_flops_per_token.palm
"""


def main(argv: Sequence[str]) -> int:
    """Run `minka plan`."""
    app = new_app(HELP)
    for add in (_add_model, _add_memory, add_time, add_layout, add_calibrate, _add_explain):
        add(app)
    return run_app(app, argv, "minka plan")


def _add_model(app: typer.Typer) -> None:
    @app.command()
    def model(
        shape: Annotated[
            list[str] | None, typer.Argument(help="layers=32 d_model=4096 heads=32 d_ff=14336 ...")
        ] = None,
        hf: Annotated[
            Path | None, typer.Option(metavar="FILE", help="a Hugging Face config.json or its folder")
        ] = None,
        recipe: Annotated[str, typer.Option(help="a recipe, run.toml or run folder")] = "",
        seq: Annotated[int | None, typer.Option(min=1, help="tokens in a sequence; default: the model's own")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        """Weights and training FLOPs a token of a model: a shape, a Hugging Face config or a recipe."""
        from minka.plan.errors import UserError
        from minka.plan.model_plan import (
            DEFAULT_SEQ_LEN,
            model_lines,
            model_plan,
            of_config,
            of_recipe,
            of_words,
            shape_json,
        )

        if sum(map(bool, (shape, hf, recipe))) != 1:
            what = "give one model: sizes, --hf or --recipe"
            raise UserError(what, where="minka plan model", remedy="`minka plan model --recipe llama3-8b`, for example")
        if hf:
            found = of_config(hf, seq)
        else:
            found = of_recipe(recipe, seq) if recipe else model_plan(of_words(shape or []), seq or DEFAULT_SEQ_LEN)
        if as_json:
            print_json(shape_json(found))
        else:
            print_table(model_lines(found))
        return 0


def _add_memory(app: typer.Typer) -> None:
    @app.command()
    def memory(
        run: Annotated[str, typer.Argument(help="a recipe, run.toml or run folder")],
        overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
        world: Annotated[int, typer.Option(min=1, help="ranks")] = 1,
        gpu: Annotated[str, typer.Option(help="a GPU's name, such as H100-SXM: does it fit?")] = "",
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        """Bytes of a rank at its peak, by kind, and whether they fit; of a pipeline, at each of its coordinates."""
        from minka.plan.memory_plan import memory_lines, memory_notes, memory_plan

        found = memory_plan(run, overrides or [], world, gpu)
        if as_json:
            print_json(found)
        else:
            print_table(memory_lines(found))
            print("\n".join(memory_notes(found)))
        return 0


def _add_explain(app: typer.Typer) -> None:
    @app.command()
    def explain(
        key: Annotated[str, typer.Argument(help="a key of a plan's JSON; a key below another with a dot")],
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        """Formula, inputs and source of a number in a plan."""
        from minka.plan.explain import explain as explained

        found = explained(key)
        if as_json:
            print_json({"key": key, **found._asdict()})
        else:
            print_table([[key, ""], *([f"  {name}", value] for name, value in found._asdict().items())])
        return 0
