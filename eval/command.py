"""`minka eval`: score a checkpoint of a run, on this machine, in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, print_table, progress, run_app
from minka.plan.scores import caveat


def main(argv: Sequence[str]) -> int:
    """Run `minka eval`."""
    app = new_app("Score a checkpoint: bits per byte on the run's validation split, by source.")

    @app.command()
    def score(
        run: Annotated[str, typer.Argument(help="run folder, or name under runs/; RUN@STEP for an older checkpoint")],
        overrides: Annotated[list[str] | None, typer.Argument(help="eval.key=value")] = None,
        output: Annotated[
            Path | None, typer.Option(metavar="FILE.json", help="write the result there, and nothing into the run")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        from minka.eval.score_checkpoint import score_checkpoint

        with progress(None, "evaluating", "batches") as advance:
            result = score_checkpoint(run, overrides or [], lambda: advance(1), output)
        if as_json:
            print_json(result)
        else:
            errors = {name: f" +- {value:.4f}" for name, value in result["stderr"].items() if value is not None}
            lost = result["unaccounted"]
            scores = [
                (name, f"{v:.4f}{errors.get(name, '')}", caveat(lost, name)) for name, v in result["scores"].items()
            ]
            print_table([score[: 3 if lost else 2] for score in scores])
            for sample in result["samples"]:
                print(f"{sample['prompt']!r} -> {sample['text']!r}")
            print(result["path"])
        return 0

    return run_app(app, argv, "minka eval")
