"""`minka train` and `minka doctor`: their arguments, and what each combination of them starts."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from minka.launch.environment import (
    choose_ranks,
    launcher,
    slurm_environment,
    threads_per_rank,
    usable_cpus,
    visible_gpus,
)
from minka.plan.cli import new_app, print_json, run_app
from minka.plan.console_output import only_reports
from minka.plan.errors import UserError

if TYPE_CHECKING:
    from minka.launch.supervisor import Job
    from minka.plan.load_config import LoadedRun

RUN_HELP = "recipe, run.toml, run folder, or name under runs/"
SOURCE = typer.Argument(help=f"{RUN_HELP}; RUN@STEP goes back to that step")
OVERRIDES = typer.Argument(help="section.key=value, any number of them; docs/configuration.md lists the settings")
RANKS = typer.Option(min=1, help="processes to start here; default: one for each GPU, else two")
DRY_RUN = typer.Option("--dry-run", help="check the run, print all its values, and exit")
WORLD = typer.Option(min=1, help="with --dry-run: show what a rank of this many would hold and send")
RANK = typer.Option(help='with --world: the rank, or "stages" for one of each stage (the default)')
GPU = typer.Option(help="with --dry-run: print the plan for this GPU (docs/plan.md), on --world or --ranks of them")
PROFILE = typer.Option(help="FIRST:LAST steps to trace, for example 10:13")
FROM_SCRATCH = typer.Option("--from-scratch", help="restart at step 0; checkpoints are moved aside")
MACHINE = typer.Option(metavar="FILE", help="measure this machine's cores, for `minka plan --gpu FILE`")
REPLAY = typer.Option(help="run this step again, on one process, and compare")
JSON = typer.Option("--json", help="print one JSON document on stdout")
HELP = """Train a run: a recipe, a TOML file, or an earlier run, which is resumed.

\b
minka train demo                      begin; the same again resumes it
minka train RUN run.max_steps=2000    resume it and make it longer
minka train RUN@500                   go back to its checkpoint of step 500
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
exit status  0 done     1 failed: the same command resumes from the last save
             2 refused  85 stopped and saved: the same command resumes
             88 hung    86 needs a person: exit_reason.json, docs/failures.md
"""


def main(argv: Sequence[str]) -> int:
    """Run `minka train`."""
    app = new_app(HELP)

    @app.command()
    def train(
        source: Annotated[str, SOURCE],
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        ranks: Annotated[int | None, RANKS] = None,
        dry_run: Annotated[bool, DRY_RUN] = False,
        world: Annotated[int | None, WORLD] = None,
        rank: Annotated[str, RANK] = "",
        gpu: Annotated[str, GPU] = "",
        profile: Annotated[str, PROFILE] = "",
        from_scratch: Annotated[bool, FROM_SCRATCH] = False,
        replay: Annotated[int | None, REPLAY] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        from minka.launch.supervisor import Job
        from minka.plan.load_config import load_run

        given: dict[str, object] = {"--ranks": ranks, "--from-scratch": from_scratch, "--profile": profile}
        if replay is not None:
            given |= {"--dry-run": dry_run, "overrides": overrides}
            _check_absent(given, "--replay", "a step is run again as it was, on one process")
            from minka.train.replay import replay_command

            return replay_command(source, replay, as_json)
        source, step = _source_and_step(source)
        loaded = load_run(source, overrides or [])
        if step is not None:
            _check_absent({"--from-scratch": from_scratch}, "RUN@STEP", "a run either goes back to a step or restarts")
        if gpu and not dry_run:
            raise UserError("--gpu is for --dry-run", where="--gpu", remedy="add --dry-run, or leave it out")
        if world is not None or rank:
            _check_absent(given, "--world", "the dry run is of as many ranks as it says")
            if not dry_run:
                raise UserError("--world and --rank are for --dry-run", remedy="add --dry-run; to train, --ranks")
            if world is None:
                raise UserError("--rank needs the number of ranks", where="--rank", remedy="add --world N")
            from minka.train.dry_run_report import dry_run_command

            return dry_run_command(loaded.config, world, rank or "stages", gpu, as_json=as_json)
        window = parse_window(profile, loaded.config.total_steps)
        # A scheduler repeats the command as it was typed, and only its first start may discard anything.
        back = {"from_scratch": from_scratch, "return_to": step}
        if (from_scratch or step is not None) and _has_gone_back(loaded):
            back = {}
        values = {"config": loaded.config, "profile": window, "as_json": as_json, "command": tuple(sys.argv), **back}
        job = Job(**values, given=tuple(sorted(loaded.given)))
        return _print_run(loaded, job, ranks, gpu) if dry_run else _start(loaded, job, ranks)

    return run_app(app, argv, "minka train")


def _has_gone_back(loaded: "LoadedRun") -> bool:
    """Whether a scheduler repeats this command as it was typed; then it says that the run resumes."""
    from minka.plan.run_folder import RunFolder
    from minka.train.rewind import repeated

    found = repeated(RunFolder.of(loaded.config), os.environ)
    if found:
        print("minka: this job has gone back once already, so this start resumes the run", file=sys.stderr)
    return found


def doctor(argv: Sequence[str]) -> int:
    """Run `minka doctor`."""
    app = new_app("Say what is installed and what will run here; with a recipe, try the recipe before paying for it.")
    app.info.no_args_is_help = False

    @app.command()
    def check(
        source: Annotated[str, typer.Argument(help=RUN_HELP)] = "",
        overrides: Annotated[list[str] | None, OVERRIDES] = None,
        machine: Annotated[Path | None, MACHINE] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        from minka.plan.load_config import load_run
        from minka.train.doctor import examine, write_machine

        if machine:
            _check_absent({"a run": source}, "--machine", "the machine is measured, and no run is tried")
            return write_machine(machine, as_json=as_json)
        return examine(load_run(source, overrides or []).config if source else None, as_json=as_json)

    return run_app(app, argv, "minka doctor")


def parse_window(window: str, total_steps: int) -> tuple[int, int]:
    """ "10:13" as (10, 13), which means steps 11 to 13; "" as (0, 0). Raises UserError."""
    first, colon, last = window.partition(":")
    if not window:
        return 0, 0
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"{window!r} is not a range of steps", where="--profile", remedy="for example --profile 10:13")
    if int(first) >= total_steps:
        raise UserError(f"{window} starts after the last step ({total_steps:,})", where="--profile")
    return int(first), int(last)


def _check_absent(given: dict[str, object], where: str, why: str) -> None:
    names = [name for name, value in given.items() if value]
    if names:
        raise UserError(f"{', '.join(names)} cannot be given", where=where, why=why, remedy="leave that out")


def _source_and_step(source: str) -> tuple[str, int | None]:
    """RUN@STEP as (RUN, STEP); anything else as (source, None). Raises UserError where STEP is not a number."""
    from minka.checkpoint.catalogue import run_and_step

    run, step = run_and_step(source)
    if not step or Path(source).exists():
        return source, None
    if not step.isdecimal():
        raise UserError(f"{step!r} is not a step", where=source, remedy="to go back to step 500: minka train RUN@500")
    return run, int(step)


def _start(loaded: "LoadedRun", job: "Job", ranks: int | None) -> int:
    from minka.launch.exit_reason_file import refusals_recorded
    from minka.launch.supervisor import supervise
    from minka.plan.run_folder import RunFolder
    from minka.train.start_or_resume import print_finished, print_missing_export, read_and_check, saved_step
    from minka.train.trackers import check_trackers

    only_reports()
    config, joins, gpus = loaded.config, launcher(os.environ), visible_gpus(os.environ)
    check_trackers(config)
    if ranks and joins:
        raise UserError(f"--ranks cannot be given: {joins} has started the ranks", remedy="leave it out")
    if joins == "slurm":
        os.environ.update(slurm_environment(os.environ))
    if joins:
        job = job.model_copy(update={"supervisor": os.getppid()})  # before torch is imported, which takes a while
        from minka.train.worker import work

        return work(job)
    folder = RunFolder.of(config)
    with refusals_recorded(folder):
        outlook = read_and_check(job)
    if outlook.decision.over:
        if outlook.export_is_missing:
            print_missing_export(folder, as_json=job.as_json)
            status = supervise(job.model_copy(update={"state": outlook.state})).status
            if status:
                return status
        print_finished(folder, outlook.decision, as_json=job.as_json)
        return 0
    count = choose_ranks(ranks, gpus)
    config.check(count)
    threads_per_rank(os.environ, count, usable_cpus())  # refused here, and not in every rank
    if not job.as_json and not outlook.state.begun:  # of a resumed run, the ranks print what has changed
        for key, (old, new) in loaded.changed.items():
            print(f"{key} = {new!r} (was {old!r})", flush=True)
    known = {"state": outlook.state, "ranks": count, "from_scratch": outlook.from_scratch}
    ending = supervise(job.model_copy(update=known))
    if ending.rank_failed:
        step = saved_step(folder)
        next_start = "begins again: nothing was saved" if step is None else f"resumes from step {step:,}"
        said = f"training has ended, because a rank failed. `minka train {quote(str(folder.path))}` {next_start}"
        print(f"minka: {said}.", file=sys.stderr)
    return ending.status


def _print_run(loaded: "LoadedRun", job: "Job", ranks: int | None, gpu: str) -> int:
    """Print the run and what starting it would do. Nothing is asked of this machine: a different one may train it."""
    from minka.data.prepare import missing_corpus, stored_tokens
    from minka.plan.epochs import describe_epochs
    from minka.plan.execution_choices import replaceable_kernels
    from minka.plan.flops import parameters, training_flops_per_token
    from minka.plan.hub_family import reader_limits
    from minka.plan.load_config import dump_toml
    from minka.plan.outlook import outlook, outlook_lines
    from minka.plan.resume_rules import explain_model_changes
    from minka.plan.run_folder import RunFolder
    from minka.train.parent_run import changes_of
    from minka.train.start_or_resume import newest_whole, read_and_check

    config = loaded.config
    planned = outlook(config, ranks or 1, gpu) if gpu else None
    found = newest_whole(read_and_check(job), RunFolder.of(config))
    if ranks:
        config.check(ranks)
    stored, tokens = stored_tokens(config), config.total_tokens
    repeated = describe_epochs(tokens, stored) if stored else ""
    derived: dict[str, float | None] = {
        "parameters": parameters(config.model),
        "total_steps": config.total_steps,
        "total_tokens": tokens,
        "training_flops": training_flops_per_token(config.model, config.data.seq_len) * tokens,
    }
    missing = missing_corpus(config, Path())
    begun, over, said = found.state.begun, found.decision.over, found.describe()
    unlike = explain_model_changes(changes_of(found.parent, config)) if found.parent else []
    if job.as_json:
        changed = {key: {"was": old, "is": new} for key, (old, new) in loaded.changed.items()}
        start = {"begun": begun, "finished": over, "step": found.step, "said": said, "missing_corpus": missing}
        derived["epochs"] = tokens / stored if stored else None
        run = config.model_dump(mode="json")
        print_json({"run": run, "changed": changed, "derived": derived, "start": start, "plan": planned})
        return 0
    print(f"# {loaded.source}\n# {RunFolder.of(config).path} {said}")
    for line in outlook_lines(planned) if planned else []:
        print(f"# {line}")
    if missing:
        print(f"# warning: on this machine there is no token store, and none can be made: {missing}")
    for line in unlike:
        print(f"# unlike {found.parent.name if found.parent else ''}: {line}")
    for key, (old, new) in loaded.changed.items():
        print(f"# changed: {key} = {new!r} (was {old!r})")
    for name, value in derived.items():
        print(f"# {name} = {value:,.0f}")
    bf16_state = "bf16" in (config.optimizer.weights, config.optimizer.moments)
    machine = replaceable_kernels(config.kernels.asked(), bf16_state=bf16_state)
    for line in filter(None, [reader_limits(config.model) if config.checkpoint.export else "", repeated, machine]):
        print(f"# {line}")
    print(dump_toml(config), end="")
    return 0
