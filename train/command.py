"""`minka train` and `minka doctor`: arguments only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from minka.plan.cli import new_app, print_json, run_app

if TYPE_CHECKING:
    from minka.plan.load import Loaded

SOURCE = "recipe, run.toml, run folder, or name under runs/"
OVERRIDES = "section.key=value, as many as you like"


def main(argv: Sequence[str]) -> int:
    """Run `minka train`."""
    app = new_app("Train a run: a recipe, a TOML file, or one that was begun before, which goes on where it stopped.")

    @app.command()
    def train(
        source: Annotated[str, typer.Argument(help=SOURCE)],
        overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES)] = None,
        ranks: Annotated[
            int | None, typer.Option(help="processes to start here; default: one a GPU, else two", show_default=False)
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved run and exit")] = False,
        profile: Annotated[str, typer.Option(help="FIRST:LAST steps to trace, for example 10:13")] = "",
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        from minka.plan.load import load_run

        loaded = load_run(source, overrides or [])
        if dry_run:
            return _print_run(loaded, as_json)
        return _start(loaded, ranks, profile, as_json)

    return run_app(app, argv, "minka train")


def doctor(argv: Sequence[str]) -> int:
    """Run `minka doctor`."""
    app = new_app("Say what is installed and what will run here; with a recipe, try the recipe before paying for it.")
    app.info.no_args_is_help = False

    @app.command()
    def check(
        source: Annotated[str, typer.Argument(help=SOURCE, show_default=False)] = "",
        overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES)] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        from minka.plan.load import load_run
        from minka.train.doctor import examine

        return examine(load_run(source, overrides or []).config if source else None, as_json=as_json)

    return run_app(app, argv, "minka doctor")


def _start(loaded: "Loaded", ranks: int | None, profile: str, as_json: bool) -> int:
    import os
    import sys

    from minka.plan.errors import UserError
    from minka.plan.run import RunFolder
    from minka.train.launch import default_ranks, joined, slurm_environment, supervise

    config, joins = loaded.config, joined(os.environ)
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks}: at least one rank is needed", remedy="leave it out, or give 1 or more")
    if ranks is not None and joins:
        raise UserError(f"--ranks cannot be given: {joins} has started the ranks", remedy="leave it out")
    folder = RunFolder.of(config)
    if folder.exists():
        folder.check_same(config)
        if folder.finished():
            print(f"{folder.path} is finished. Its export: {folder.export}", file=sys.stderr if as_json else sys.stdout)
            return 0
    if not as_json:
        for key, (old, new) in loaded.changed.items():
            print(f"{key} = {new!r} (was {old!r})")
    if joins == "slurm":
        os.environ.update(slurm_environment(os.environ))
    if joins:
        return _join(loaded, profile, as_json)
    count = ranks or default_ranks(os.environ)
    config.layout.resolve(count)  # refuses here, before anything is started
    return supervise(config, count, profile, as_json)


def _join(loaded: "Loaded", profile: str, as_json: bool) -> int:
    from minka.train.worker import WorkerJob, work

    return work(WorkerJob(loaded.config, profile, as_json, threads=None, beat=None))


def _print_run(loaded: "Loaded", as_json: bool) -> int:
    from minka.plan.flops import parameters, training_flops_per_token
    from minka.plan.load import dump_toml

    config = loaded.config
    derived = {
        "parameters": parameters(config.model),
        "total_steps": config.total_steps,
        "total_tokens": config.total_tokens,
        "training_flops": training_flops_per_token(config.model, config.data.seq_len) * config.total_tokens,
    }
    if as_json:
        changed = {key: {"was": old, "is": new} for key, (old, new) in loaded.changed.items()}
        print_json({"run": config.model_dump(mode="json"), "changed": changed, "derived": derived})
        return 0
    print(f"# {loaded.source}")
    for key, (old, new) in loaded.changed.items():
        print(f"# changed: {key} = {new!r} (was {old!r})")
    for name, value in derived.items():
        print(f"# {name} = {value:,.0f}")
    print(dump_toml(config), end="")
    return 0
