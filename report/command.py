"""`minka report`: runs as one page."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minka.plan.cli import new_app, print_json, run_app

WATCH_SECONDS = "10"


def main(argv: Sequence[str]) -> int:
    """Run `minka report`."""
    app = new_app("Show runs as one HTML page that needs no network: curves, scores, events, settings, lineage.")

    @app.command()
    def report(
        runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or names under runs/")],
        out: Annotated[
            Path | None,
            typer.Option(help="file to write (default: report.html in the run's folder; of several runs, here)"),
        ] = None,
        watch: Annotated[
            float | None,
            typer.Option(
                min=1,
                metavar="[SECONDS]",
                help=f"write it again every so many seconds ({WATCH_SECONDS} where none are given) until the runs "
                "have ended; an open page follows",
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print the page's numbers as one JSON document")] = False,
    ) -> int:
        from minka.report.report_writer import Report, Spoken, numbers

        spoken = Spoken(sys.stderr, sys.stderr if as_json else sys.stdout)
        report = Report(runs, out)
        file, shown = report.write() if watch is None else report.watch(watch, spoken.say)
        spoken.say(file, shown)
        if as_json:
            print_json(numbers(file, shown))
        return 0

    return run_app(app, with_seconds(argv), "minka report")


def with_seconds(argv: Sequence[str]) -> list[str]:
    """`--watch` without a number gets the default: an option with an optional value is nothing that typer has."""
    out: list[str] = []
    for i, word in enumerate(argv):
        out.append(word)
        after = argv[i + 1] if i + 1 < len(argv) else ""
        if word == "--watch" and not after.replace(".", "", 1).isdigit():
            out.append(WATCH_SECONDS)
    return out
