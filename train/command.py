"""`minka train` and `minka doctor`: arguments only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from minka.plan.cli import new_app, print_json, run_app

if TYPE_CHECKING:
    from minka.plan.load_config import Loaded
    from minka.plan.run_folder import RunFolder

SOURCE = "recipe, run.toml, run folder, or name under runs/"
OVERRIDES = "section.key=value, as many as you like; docs/configuration.md lists the settings"
HELP = """Train a run: a recipe, a TOML file, or one that was begun before, which goes on where it stopped.

\b
minka train demo                      begin; the same again: go on
minka train RUN run.max_steps=2000    go on and make it longer
minka train RUN run.name=NEW          a new run with its settings
minka train RUN run.name=NEW run.start_from=RUN@500
                                      and from its weights at step 500
minka train RUN --replay 120          run a step again and compare
minka train RUN --dry-run --world 256 --rank 17
                                      what that rank would hold and send

\b
Ctrl-C, SIGTERM, or a file called STOP in the run's folder: save and stop.
A second Ctrl-C stops at once, unsaved. STOP holds until it is deleted.

\b
exit status  0 done     1 failed: the same command goes on from what is saved
             2 refused  85 stopped and saved: the same command goes on
             88 hung    86 needs a person: exit_reason.json, docs/failures.md
"""


def main(argv: Sequence[str]) -> int:
    """Run `minka train`."""
    app = new_app(HELP)

    @app.command()
    def train(
        source: Annotated[str, typer.Argument(help=SOURCE)],
        overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES)] = None,
        ranks: Annotated[
            int | None, typer.Option(help="processes to start here; default: one a GPU, else two", show_default=False)
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="check the run, print all its values, and exit")
        ] = False,
        world: Annotated[
            int | None,
            typer.Option(min=1, help="with --dry-run: on so many ranks, what one holds and sends", show_default=False),
        ] = None,
        rank: Annotated[
            str,
            typer.Option(
                help='with --world: which one, or "stages": one of each stage (the default)', show_default=False
            ),
        ] = "",
        profile: Annotated[str, typer.Option(help="FIRST:LAST steps to trace, for example 10:13")] = "",
        from_scratch: Annotated[
            bool, typer.Option("--from-scratch", help="begin again at step 0; checkpoints are moved aside")
        ] = False,
        replay: Annotated[
            int | None, typer.Option(help="run this step again, on one process, and compare", show_default=False)
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
    ) -> int:
        from minka.launch.exit_reason import explained
        from minka.plan.load_config import load_run
        from minka.plan.run_folder import RunFolder

        if replay is not None:
            others = {"--ranks": ranks is not None, "--dry-run": dry_run, "--from-scratch": from_scratch}
            others |= {"--profile": bool(profile), "overrides": bool(overrides)}
            return _replay(source, [name for name, given in others.items() if given], replay, as_json)
        loaded = load_run(source, overrides or [])
        if world is not None or rank:
            others = {"--ranks": ranks is not None, "--from-scratch": from_scratch, "--profile": bool(profile)}
            return _dry_run_of(loaded, world, rank, dry_run, [name for name, given in others.items() if given], as_json)
        if dry_run:
            return _print_run(loaded, ranks, profile, from_scratch, as_json)
        with explained(RunFolder.of(loaded.config)):
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
        from minka.plan.load_config import load_run
        from minka.train.doctor import examine

        return examine(load_run(source, overrides or []).config if source else None, as_json=as_json)

    return run_app(app, argv, "minka doctor")


def _start(loaded: "Loaded", ranks: int | None, profile: str, from_scratch: bool, as_json: bool) -> int:
    import os

    from minka.launch.supervisor import choose_ranks, joined, restarted, slurm_environment, supervise, visible_gpus
    from minka.plan.errors import UserError
    from minka.plan.run_folder import RunFolder
    from minka.train.standing import standing
    from minka.train.start import look
    from minka.train.trackers import check_trackers

    config, joins, gpus = loaded.config, joined(os.environ), visible_gpus(os.environ)
    _check_profile(profile, loaded)
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
    # A scheduler repeats the command as it was typed: only the first start may throw away what there is.
    from_scratch = from_scratch and folder.begun() and not restarted(os.environ)
    outlook = look(config, from_scratch=from_scratch)
    if outlook.over:
        _say_finished(folder, outlook.ignored, as_json)
        return 0
    if outlook.begun and not joins:
        folder.check_may_start()
    if joins == "slurm":
        os.environ.update(slurm_environment(os.environ))
    if joins:
        return _join(loaded, profile, from_scratch, as_json)
    count = choose_ranks(ranks, gpus)
    config.check(count)  # refuses here, before anything is started
    if not as_json and not outlook.begun:  # of a run that goes on, the ranks say what is another than before
        for key, (old, new) in loaded.changed.items():
            print(f"{key} = {new!r} (was {old!r})", flush=True)

    def saved_step() -> int | None:
        place = standing(folder)
        return place.step if place else None

    return supervise(config, count, profile, from_scratch, as_json, saved_step)


def _check_profile(profile: str, loaded: "Loaded") -> None:
    from minka.launch.supervisor import parse_window
    from minka.plan.errors import UserError

    if parse_window(profile)[0] >= loaded.config.total_steps:
        raise UserError(f"{profile} lies behind the run's end, step {loaded.config.total_steps:,}", where="--profile")


def _say_finished(folder: "RunFolder", ignored: list[str], as_json: bool) -> None:
    export = folder.export if folder.export.is_dir() else None
    if as_json:
        print_json({"run": str(folder.path), "status": 0, "finished": True, "export": export and str(export)})
        return
    print(
        f"{folder.path} is finished. {f'Its export: {export}. ' if export else ''}To go on, make it longer "
        "(run.max_steps=...); a new run needs a name (run.name=...)"
    )
    if ignored:
        print(f"Without more steps, {', '.join(ignored)} changes nothing in it.")


def _replay(source: str, others: list[str], step: int, as_json: bool) -> int:
    from minka.plan.errors import UserError
    from minka.train.replay import replay_command

    if others:
        raise UserError(
            f"{', '.join(others)} cannot be given",
            where="--replay",
            why="a step is run again as it was, on one process",
            remedy="leave that out",
        )
    return replay_command(source, step, as_json)


def _join(loaded: "Loaded", profile: str, from_scratch: bool, as_json: bool) -> int:
    import sys

    from minka.train.forker import run_guarded
    from minka.train.worker import WorkerJob, prepare_joined, work

    job = WorkerJob(loaded.config, profile, as_json, threads=None, beat=None, from_scratch=from_scratch)

    def body() -> int:
        prepare_joined(loaded.config, sys.argv)
        return work(job)

    return run_guarded(body, as_json)


def _dry_run_of(loaded: "Loaded", world: int | None, rank: str, dry_run: bool, others: list[str], as_json: bool) -> int:
    from minka.plan.errors import UserError

    if not dry_run:
        raise UserError("--world and --rank are for --dry-run", remedy="add --dry-run; to train, --ranks")
    if world is None:
        raise UserError("--rank needs to know of how many", where="--rank", remedy="add --world N")
    if others:
        raise UserError(
            f"{', '.join(others)} cannot be given",
            where="--world",
            why="nothing is started: a dry run is of ranks that are not there, as many as --world says",
            remedy="leave that out",
        )
    from minka.train.dry_run_report import dry_run_command

    return dry_run_command(loaded.config, world, rank or "stages", as_json=as_json)


def _print_run(loaded: "Loaded", ranks: int | None, profile: str, from_scratch: bool, as_json: bool) -> int:
    """The run and what would become of it. What this machine lacks is no matter: it need not be the one that trains."""
    from minka.launch.supervisor import choose_ranks
    from minka.plan.flops import parameters, training_flops_per_token
    from minka.plan.load_config import dump_toml
    from minka.plan.run_folder import RunFolder
    from minka.train.start import look

    config, folder = loaded.config, RunFolder.of(loaded.config)
    _check_profile(profile, loaded)
    from_scratch = from_scratch and folder.begun()
    outlook = look(config, from_scratch=from_scratch)
    if outlook.begun and not outlook.over:
        folder.check_may_start()
    if ranks is not None:
        config.check(choose_ranks(ranks, gpus=0))
    derived = {
        "parameters": parameters(config.model),
        "total_steps": config.total_steps,
        "total_tokens": config.total_tokens,
        "training_flops": training_flops_per_token(config.model, config.data.seq_len) * config.total_tokens,
    }
    told = outlook.told(from_scratch=from_scratch)
    if as_json:
        changed = {key: {"was": old, "is": new} for key, (old, new) in loaded.changed.items()}
        start = {"begun": outlook.begun, "finished": outlook.over, "step": outlook.step, "said": told}
        print_json({"run": config.model_dump(mode="json"), "changed": changed, "derived": derived, "start": start})
        return 0
    print(f"# {loaded.source}")
    print(f"# {folder.path} {told}")
    for key, (old, new) in loaded.changed.items():
        print(f"# changed: {key} = {new!r} (was {old!r})")
    for name, value in derived.items():
        print(f"# {name} = {value:,.0f}")
    print(dump_toml(config), end="")
    return 0
