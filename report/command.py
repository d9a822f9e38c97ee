"""`minka report`: runs as one page."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from minka.plan.cli import new_app, print_json, run_app

WATCH_SECONDS = "10"
WATCH_HELP = f"write again every SECONDS (default {WATCH_SECONDS}) until the runs have ended; an open page reloads"


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
        seconds: Annotated[float | None, typer.Option("--watch", min=1, metavar="[SECONDS]", help=WATCH_HELP)] = None,
        as_json: Annotated[bool, typer.Option("--json", help="print the page's numbers as one JSON document")] = False,
    ) -> int:
        from minka.report.write_report import watch_runs, write_report

        printed: set[str] = set()

        def announce(file: Path, data: dict[str, Any]) -> None:
            warnings = [f"minka: {line}" for run in data["runs"] for line in run["warnings"]]
            numbers = [*map(run_line, data["runs"]), str(file)]
            for line in [*warnings, *numbers]:
                if line not in printed:  # each once, however often the page is written
                    printed.add(line)
                    print(line, file=sys.stderr if as_json or line in warnings else sys.stdout, flush=True)

        file, data = write_report(runs, out) if seconds is None else watch_runs(runs, out, seconds, announce)
        announce(file, data)
        if as_json:
            print_json({"format": data["format"], "runs": [run["headline"] for run in data["runs"]], "page": str(file)})
        return 0

    return run_app(app, with_watch_seconds(argv), "minka report")


def run_line(run: dict[str, Any]) -> str:
    """Return one run in one line: status, progress, newest loss, best score."""
    numbers = run["headline"]
    plan, loss, best = numbers["plan"], numbers["loss"], numbers["best"]
    of = f" of {plan['steps']:,}" if plan else ""
    words = [f"{run['name']}: {run['status']['label']}", f"step {numbers['step']:,}{of}"]
    words += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
    words += [f"best {best['bits_per_byte']:.4f} bits per byte"] if best else []
    return ", ".join(words)


def with_watch_seconds(argv: Sequence[str]) -> list[str]:
    """Add the default after `--watch` without a number: typer has no option with an optional value."""
    words: list[str] = []
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        words.append(word)
        if word == "--watch" and not after.replace(".", "", 1).isdigit():
            words.append(WATCH_SECONDS)
    return words
