"""`minka export`: a run's checkpoint as a folder that transformers loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, run_app


def main(argv: Sequence[str]) -> int:
    """Run `minka export`."""
    app = new_app("Write a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer.")

    @app.command()
    def export(
        run: Annotated[str, typer.Argument(help="run folder, or name under runs/; RUN@STEP takes that step")],
        folder: Annotated[Path, typer.Argument(help="folder to write; replaces an earlier export, nothing else")],
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    ) -> int:
        from minka.checkpoint.catalogue import find_checkpoint, run_and_step
        from minka.checkpoint.export import export_checkpoint
        from minka.checkpoint.reader_lease import leased
        from minka.plan.hub_family import reader_limits
        from minka.plan.run_folder import find_run, store_of
        from minka.plan.run_state import trained_model

        name, step = run_and_step(run)
        found = find_run(name)
        checkpoint, store = find_checkpoint(found.checkpoints, step), store_of(found)
        model = trained_model(found)
        with leased(found.path, checkpoint):
            export_checkpoint(checkpoint, folder, model, store.tokenizer, store.eod)
        limits = reader_limits(model)
        if as_json:
            print_json({"checkpoint": str(checkpoint), "folder": str(folder), "limits": limits})
        else:
            print("\n".join(filter(None, [f"{checkpoint} -> {folder}", limits])))
        return 0

    return run_app(app, argv, "minka export")
