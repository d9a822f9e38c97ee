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
        from_scratch: Annotated[
            bool, typer.Option("--from-scratch", help="begin again at step 0; checkpoints are moved aside")
        ] = False,
        replay: Annotated[
            int | None, typer.Option(help="run this step again, on one process, and compare", show_default=False)
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        from minka.plan.load import load_run

        if replay is not None:
            return _replay(source, overrides or [], replay, as_json)
        loaded = load_run(source, overrides or [])
        if dry_run:
            return _print_run(loaded, as_json)
        return _start(loaded, ranks, profile, from_scratch, as_json)

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


def _start(loaded: "Loaded", ranks: int | None, profile: str, from_scratch: bool, as_json: bool) -> int:
    import os

    from minka.plan.errors import UserError
    from minka.plan.run import RunFolder
    from minka.train.launch import (
        choose_ranks,
        joined,
        parse_window,
        restarted,
        slurm_environment,
        supervise,
        visible_gpus,
    )
    from minka.train.standing import begin_again
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
    begun = folder.begun()
    # A scheduler repeats the command as it was typed: only the first start may throw away what there is.
    from_scratch = from_scratch and begun and not restarted(os.environ)
    if _is_over(folder, loaded, from_scratch, as_json):
        return 0
    if begun and not joins:
        folder.check_may_start()
    if joins == "slurm":
        os.environ.update(slurm_environment(os.environ))
    if joins:
        return _join(loaded, profile, from_scratch, as_json)
    count = choose_ranks(ranks, gpus)
    config.layout.resolve(count)  # refuses here, before anything is started
    if from_scratch:
        aside = begin_again(folder)
        if aside and not as_json:
            print(f"the checkpoints there were lie in {aside}")
    if not as_json and not begun:  # of a run that goes on, the ranks say what is another than before
        for key, (old, new) in loaded.changed.items():
            print(f"{key} = {new!r} (was {old!r})", flush=True)
    return supervise(config, count, profile, as_json)


def _is_over(folder: "RunFolder", loaded: "Loaded", from_scratch: bool, as_json: bool) -> bool:
    """Whether the run is finished, which is said. Raises UserError for a run that may not begin or go on like this."""
    from minka.plan.changes import LENGTH, check_resume

    config = loaded.config
    changed = folder.changes(config) if folder.begun() else None
    if config.run.start_from and (changed is None or "run.start_from" in changed):  # then it may be the run itself
        from minka.train.origin import check_parent, check_tokenizer, find_parent

        parent = find_parent(config)
        if parent and changed is None:
            check_parent(parent, config)
            check_tokenizer(parent, config)
    if changed is None:
        return False
    from minka.train.standing import check_goes_on, standing

    check_resume(changed, config.run.name, str(folder.path))
    if from_scratch:
        return False
    over = folder.finished()
    if not over or any(key in changed for key in LENGTH):
        check_goes_on(folder, config)
        place = standing(folder)
        over = over and (place is None or config.finished(place.step, place.tokens))
    if over:
        _say_finished(folder, [key for key in changed if key not in LENGTH], as_json)
    return over


def _say_finished(folder: "RunFolder", ignored: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"run": str(folder.path), "status": 0, "finished": True, "export": str(folder.export)})
        return
    print(
        f"{folder.path} is finished. Its export: {folder.export}. To go on, make it longer (run.max_steps=...); "
        "a new run needs a name (run.name=...)"
    )
    if ignored:
        print(f"Without more steps, {', '.join(ignored)} changes nothing in it.")


def _replay(source: str, overrides: list[str], step: int, as_json: bool) -> int:
    from minka.plan.errors import UserError
    from minka.train.replay import replay_command

    if overrides:
        raise UserError(
            "overrides cannot be given", where="--replay", why="a step is run again as it was", remedy="leave them out"
        )
    return replay_command(source, step, as_json)


def _join(loaded: "Loaded", profile: str, from_scratch: bool, as_json: bool) -> int:
    import sys

    from minka.train.ranks import run_guarded
    from minka.train.worker import WorkerJob, prepare_joined, work

    job = WorkerJob(loaded.config, profile, as_json, threads=None, beat=None, prepared=False)

    def body() -> int:
        prepare_joined(loaded.config, sys.argv, from_scratch=from_scratch)
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
