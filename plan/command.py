"""`minka plan`: what a model counts, and where each number comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, print_table, run_app

HELP = """Plan a run, on a laptop, before anything is bought.

\b
minka plan model --recipe llama3-8b          weights, and FLOPs a token
minka plan model --hf FOLDER --seq 8192      of any Hugging Face decoder
minka plan explain training_flops_per_token.palm
"""


def main(argv: Sequence[str]) -> int:
    """Run `minka plan`."""
    app = new_app(HELP)

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

    return run_app(app, argv, "minka plan")
