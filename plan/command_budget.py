"""Commands of `minka plan`: what to train, how often to save, whether it pays, and how plans turned out.

Own modules are imported where a command needs them, as in command.py, so that --help stays instant.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minka.plan.cli import print_json, print_table

JSON = typer.Option("--json", help="print one JSON document on stdout")


def add_budget(app: typer.Typer) -> None:
    """Add `minka plan budget`."""

    @app.command()
    def budget(
        flops: Annotated[float | None, typer.Option(help="the budget: 6 x weights x tokens")] = None,
        gpu_hours: Annotated[float | None, typer.Option(help="the budget, with --gpu")] = None,
        dollars: Annotated[float | None, typer.Option(help="the budget, with --gpu and --price-per-gpu-hour")] = None,
        days: Annotated[float | None, typer.Option(help="the budget, with --gpu and --gpus")] = None,
        tokens: Annotated[float | None, typer.Option(help="tokens to train on")] = None,
        params: Annotated[float | None, typer.Option(help="weights of the model")] = None,
        loss: Annotated[float | None, typer.Option(help="nats a token to reach")] = None,
        gpu: Annotated[str, typer.Option(help="a GPU's name, or a file that describes a cluster (docs/plan.md)")] = "",
        gpus: Annotated[int, typer.Option("--gpus", "--world", min=1, help="how many at once")] = 1,
        mfu: Annotated[
            str, typer.Option(help="share of the peak, of 6 N D; plan: that of the fastest layout which fits")
        ] = "0.4",
        price_per_gpu_hour: Annotated[float | None, typer.Option(metavar="DOLLARS")] = None,
        unique_tokens: Annotated[float, typer.Option(help="tokens that differ; default: as many as needed")] = 0.0,
        most_epochs: Annotated[float, typer.Option(help="passes over them that are accepted")] = 16.0,
        inference_tokens: Annotated[float, typer.Option(help="tokens of use, whose FLOPs are in the budget")] = 0.0,
        law: Annotated[str, typer.Option(help="of the loss: a name, or what `minka plan fit` wrote")] = "epoch",
        vocab: Annotated[int, typer.Option(min=0, help="entries of the vocabulary; 0: what suits the size")] = 0,
        seq: Annotated[int, typer.Option(min=0, help="tokens in a sequence; 0: what suits the size")] = 0,
        emit: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="write a run for `minka train`")] = None,
        data_of: Annotated[str, typer.Option(metavar="RECIPE", help="whose data the emitted run reads")] = "",
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """What to train with a budget: weights, tokens, shape, batch, rate, the loss to expect, and the cost."""
        from minka.plan.budget_layout import budget_with_layout, layout_of
        from minka.plan.budget_plan import Wishes, budget_plan
        from minka.plan.cluster import find_cluster
        from minka.plan.compute_budget import BudgetAsked, BudgetMachine, Goal, check_machine, read_number
        from minka.plan.emit_run import write_run
        from minka.plan.errors import UserError
        from minka.plan.law_file import law_of_name

        share = 0.4 if mfu == "plan" else read_number(mfu, "--mfu", "a share of the peak such as 0.4, or plan")
        machine = BudgetMachine(find_cluster(gpu) if gpu else None, gpus, share, price_per_gpu_hour)
        goal = Goal(law_of_name(law), unique_tokens, inference_tokens)
        check_machine(machine, goal)
        asked = BudgetAsked(flops, gpu_hours, dollars, days, tokens, params, loss)
        if data_of and not emit:
            raise UserError("only a run that is written has data", where="--data-of", remedy="add --emit run.toml")
        wishes, layout = Wishes(vocab, seq, most_epochs), dict[str, Any]()
        if mfu == "plan":
            found, layout = budget_with_layout(asked, machine, goal, wishes)
        else:
            found = budget_plan(asked, machine, goal, wishes)
        if emit:
            write_run(emit, found, layout or layout_of(found, machine)[0], data_of)
        if as_json:
            print_json(found)
            return 0
        _print_budget(found)
        if emit:
            print(f"wrote {emit}: look at it, then `minka train {emit} --dry-run`")
        return 0


def _print_budget(found: Mapping[str, Any]) -> None:
    from minka.plan.budget_plan import alternative_lines, budget_lines

    print_table(budget_lines(found))
    print()
    head, *rows = alternative_lines(found)
    print_table(rows, head)
    print("\n".join(["", *(f"note: {note}" for note in found["notes"])]))


def add_fit(app: typer.Typer) -> None:
    """Add `minka plan fit`."""

    @app.command()
    def fit(
        runs: Annotated[list[str], typer.Argument(metavar="RUNS", help="a CSV file, or folders of runs that ended")],
        output: Annotated[
            Path | None, typer.Option("-o", "--output", metavar="FILE.toml", help="write the law")
        ] = None,
        drop_highest: Annotated[int, typer.Option(min=0, help="losses that are left out, from the highest")] = 0,
        drop_outliers: Annotated[
            float, typer.Option(min=0.0, help="leave out runs further off than so many median residuals, and refit")
        ] = 0.0,
        bootstraps: Annotated[int, typer.Option(min=0, help="refits of drawn runs, for the intervals")] = 400,
        seed: Annotated[int, typer.Option(help="of the draws")] = 42,
        full_grid: Annotated[bool, typer.Option(help="follow all 4,500 starts")] = False,
        flops: Annotated[float | None, typer.Option(help="say the optimum for so many")] = None,
        plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it: .png, .svg or .html")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """Fit L = E + A/N^alpha + B/D^beta to runs: numbers with intervals, the optimum, and a test of foresight."""
        from minka.plan.fit_plan import Choices, fit_lines, fit_plan
        from minka.plan.plot import check_plot, plot_fit

        if plot:
            check_plot(plot)
        found = fit_plan(runs, Choices(drop_highest, drop_outliers, bootstraps, seed, full_grid, flops), output)
        if plot:
            plot_fit(found, plot)
        if as_json:
            print_json(found)
            return 0
        print_table(fit_lines(found))
        print("\n".join(["", *(f"note: {note}" for note in found["notes"])]))
        return 0


def add_cadence(app: typer.Typer) -> None:
    """Add `minka plan cadence`."""

    @app.command()
    def cadence(
        gpus: Annotated[int, typer.Option("--gpus", "--world", min=1, help="of the job")] = 8,
        mtbf_hours: Annotated[float | None, typer.Option(help="between failures of the job; default: --rate")] = None,
        rate: Annotated[str, typer.Option(help="published failures of nodes: rsc-1, rsc-2 or llama3")] = "rsc-1",
        save_seconds: Annotated[float, typer.Option(help="for which a save stalls training")] = 20.0,
        flush_seconds: Annotated[float, typer.Option(help="until a save could be restored")] = 0.0,
        restart_seconds: Annotated[float, typer.Option(help="from a failure to the first new step")] = 600.0,
        step_seconds: Annotated[float | None, typer.Option(help="of a step: `minka plan time`")] = None,
        evaluation_seconds: Annotated[float | None, typer.Option(help="of an evaluation")] = None,
        repair_hours: Annotated[float, typer.Option(help="until a node that failed is back")] = 24.0,
        run: Annotated[str, typer.Option(metavar="RUN", help="a recipe, run.toml or run folder: what to keep")] = "",
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """How often to save and evaluate, what to keep, spare nodes, and the training time that is left."""
        from minka.plan.cadence_plan import CadenceAsked, cadence_lines, cadence_plan

        asked = CadenceAsked(
            gpus, mtbf_hours, rate, save_seconds, flush_seconds, restart_seconds, step_seconds, evaluation_seconds,
            repair_hours, run
        )  # fmt: skip
        found = cadence_plan(asked)
        if as_json:
            print_json(found)
        else:
            print_table(cadence_lines(found))
        return 0


def add_check(app: typer.Typer) -> None:
    """Add `minka plan check`."""

    @app.command()
    def check(
        run: Annotated[str, typer.Argument(help="a run's folder or name")],
        loss: Annotated[float | None, typer.Option(help="nats a token that it should end at")] = None,
        law: Annotated[str, typer.Option(help="of the loss: a name, or what `minka plan fit` wrote")] = "",
        earliest: Annotated[float, typer.Option(help="share of the tokens before which nothing is decided")] = 0.25,
        margin: Annotated[float, typer.Option(help="share by which even the best end must miss the target")] = 0.015,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """A run against its target: where its curve ends, and whether to continue, probe or stop."""
        from minka.plan.check_plan import check_lines, check_plan
        from minka.plan.forecast import CheckRules

        found = check_plan(run, loss, law, CheckRules(earliest=earliest, margin=margin))
        if as_json:
            print_json(found)
        else:
            print_table(check_lines(found))
        return 0


def add_score(app: typer.Typer) -> None:
    """Add `minka plan score`."""

    @app.command()
    def score(
        runs: Annotated[list[str], typer.Argument(help="folders or names of runs")],
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """What was planned for runs and what came of it, misses included."""
        from minka.plan.score_plan import score_lines, score_plan

        found = score_plan(runs)
        if as_json:
            print_json(found)
        else:
            head, *rows = score_lines(found)
            print_table(rows, head)
        return 0


def add_ladder(app: typer.Typer) -> None:
    """Add `minka plan ladder`."""

    @app.command()
    def ladder(
        flops: Annotated[float, typer.Option(help="of the large run: 6 x weights x tokens")],
        within: Annotated[float, typer.Option(help="share to which its best size should be known")] = 0.5,
        smallest: Annotated[float, typer.Option(help="weights of the smallest run, at least")] = 1e7,
        sizes: Annotated[str, typer.Option(help="weights of each size, instead: 1e6,2e6,4e6")] = "",
        law: Annotated[
            str, typer.Option(help="as it is believed to be: a name, or a file of `minka plan fit`")
        ] = "epoch",
        noise: Annotated[float, typer.Option(help="share by which runs scatter about the law")] = 0.003,
        data_of: Annotated[str, typer.Option(metavar="RECIPE", help="whose data the runs read")] = "",
        vocab: Annotated[int, typer.Option(min=0, help="entries of the vocabulary; 0: what suits the size")] = 0,
        seq: Annotated[int, typer.Option(min=0, help="tokens in a sequence; 0: what suits the size")] = 0,
        emit: Annotated[Path | None, typer.Option(metavar="FOLDER", help="write the runs and a script")] = None,
        as_json: Annotated[bool, JSON] = False,
    ) -> int:
        """The cheapest small runs that tell the best size of a large one: trunks, and branches that decay."""
        from minka.plan.compute_budget import read_number
        from minka.plan.ladder_plan import LadderAsked, ladder_lines, ladder_plan

        given = tuple(read_number(size, "--sizes", "numbers with commas") for size in sizes.split(",") if size)
        found = ladder_plan(LadderAsked(flops, within, smallest, given, law, noise, data_of, vocab, seq), emit)
        if as_json:
            print_json(found)
        else:
            print_table(ladder_lines(found))
        return 0
