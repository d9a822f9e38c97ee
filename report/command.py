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
            typer.Option(help="file to write (default: report.html in the run's folder; for several runs, here)"),
        ] = None,
        seconds: Annotated[
            float | None,
            typer.Option(
                "--watch",
                min=1,
                metavar="[SECONDS]",
                help=f"write the page again every SECONDS (default {WATCH_SECONDS}) until the runs have ended; "
                "an open page reloads itself",
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print the page's numbers as one JSON document")] = False,
    ) -> int:
        from minka.report.console_lines import ConsoleLines
        from minka.report.watch import watch
        from minka.report.write_report import write_report

        lines = ConsoleLines(sys.stderr, sys.stderr if as_json else sys.stdout)
        file, data = write_report(runs, out) if seconds is None else watch(runs, out, seconds, lines.print)
        lines.print(file, data)
        if as_json:
            print_json({"format": data["format"], "runs": [run["headline"] for run in data["runs"]], "page": str(file)})
        return 0

    return run_app(app, with_watch_seconds(argv), "minka report")


def with_watch_seconds(argv: Sequence[str]) -> list[str]:
    """Add the default after `--watch` without a number: typer has no option with an optional value."""
    out: list[str] = []
    for i, word in enumerate(argv):
        out.append(word)
        after = argv[i + 1] if i + 1 < len(argv) else ""
        if word == "--watch" and not after.replace(".", "", 1).isdigit():
            out.append(WATCH_SECONDS)
    return out
