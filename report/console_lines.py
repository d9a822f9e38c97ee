"""What `minka report` prints: warnings about the files, a line for each run, the path of the page."""

from pathlib import Path
from typing import Any, TextIO

from minka.report.page_data import PageData


class ConsoleLines:
    """Prints each line once, however often the page is written."""

    def __init__(self, errors: TextIO, out: TextIO) -> None:
        self._errors, self._out = errors, out
        self._printed: set[str] = set()

    def print(self, file: Path, data: PageData) -> None:
        """Print the lines of a page that was written."""
        for run in data["runs"]:
            self._print([f"minka: {line}" for line in run["warnings"]], self._errors)
        self._print([*map(run_line, data["runs"]), str(file)], self._out)

    def _print(self, lines: list[str], to: TextIO) -> None:
        for line in lines:
            if line not in self._printed:
                self._printed.add(line)
                print(line, file=to, flush=True)


def run_line(run: dict[str, Any]) -> str:
    """Return one run in one line: status, progress, newest loss, best score."""
    numbers = run["headline"]
    plan, loss, best = numbers["plan"], numbers["loss"], numbers["best"]
    of = f" of {plan['steps']:,}" if plan else ""
    words = [f"{run['name']}: {run['status']['label']}", f"step {numbers['step']:,}{of}"]
    words += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
    words += [f"best {best['value']:.4f} bits per byte"] if best else []
    return ", ".join(words)
