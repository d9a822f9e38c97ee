"""`minka train` and `minka doctor`: arguments only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from minka.plan.cli import new_app, print_json, run_app

if TYPE_CHECKING:
    from minka.plan.load import Loaded
    from minka.plan.run import RunFolder

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

    from minka.plan.errors import UserError
    from minka.plan.run import RunFolder
    from minka.train.launch import choose_ranks, joined, parse_window, slurm_environment, supervise, visible_gpus
    from minka.train.track import check_trackers

    config, joins, gpus = loaded.config, joined(os.environ), visible_gpus(os.environ)
    if parse_window(profile)[0] >= config.total_steps:
        raise UserError(f"{profile} lies behind the run's end, step {config.total_steps:,}", where="--profile")
    check_trackers(config)
    if config.kernels.attention == "varlen" and not gpus:
        raise UserError(
            "varlen attention needs a GPU, and there is none here",
            where="kernels.attention",
            remedy='set it to "auto"',
        )
    if ranks is not None and joins:
        raise UserError(f"--ranks cannot be given: {joins} has started the ranks", remedy="leave it out")
    folder = RunFolder.of(config)
    if folder.exists():
        folder.check_same(config)
        if folder.finished():
            return _say_finished(folder, as_json)
        if not joins:
            folder.check_may_start()
    if joins == "slurm":
        os.environ.update(slurm_environment(os.environ))
    if joins:
        return _join(loaded, profile, as_json)
    count = choose_ranks(ranks, gpus)
    config.layout.resolve(count)  # refuses here, before anything is started
    if not as_json:
        for key, (old, new) in loaded.changed.items():
            print(f"{key} = {new!r} (was {old!r})", flush=True)
    return supervise(config, count, profile, as_json)


def _say_finished(folder: "RunFolder", as_json: bool) -> int:
    if as_json:
        print_json({"run": str(folder.path), "status": 0, "finished": True, "export": str(folder.export)})
    else:
        print(f"{folder.path} is finished. Its export: {folder.export}. A new run needs a name: run.name=...")
    return 0


def _join(loaded: "Loaded", profile: str, as_json: bool) -> int:
    import sys

    from minka.train.ranks import run_guarded
    from minka.train.worker import WorkerJob, prepare_joined, work

    job = WorkerJob(loaded.config, profile, as_json, threads=None, beat=None, prepared=False)

    def body() -> int:
        prepare_joined(loaded.config, sys.argv)
        return work(job)

    return run_guarded(body, as_json)


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
