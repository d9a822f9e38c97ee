"""Runs read, a page written: once, or again and again while they go on."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from minka.report.assemble import page, plotly_script, write_page
from minka.report.load_run import Run, read_run
from minka.report.page_data import Document, document


class Report:
    """The page of some runs. Raises UserError for a run that is not there."""

    def __init__(self, given: Sequence[str], out: Path | None) -> None:
        self._given = list(dict.fromkeys(given))
        self._plotly = plotly_script()
        self._out = out

    def write(self, refresh_seconds: float = 0.0, now: float | None = None) -> tuple[Path, Document]:
        """Read the runs and write the page; where it is, and what is in it."""
        runs = _once([read_run(name) for name in self._given])
        shown = document(runs, time.time() if now is None else now)
        file = self._out or default_out(runs)
        write_page(file, page(shown.page, self._plotly, refresh_seconds if not _ended(shown) else 0.0))
        return file, shown

    def watch(
        self,
        seconds: float,
        said: Callable[[Path, Document], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> tuple[Path, Document]:
        """Write again every `seconds` until every run has ended, or a person interrupts; `said` hears of each."""
        try:
            while True:
                file, shown = self.write(seconds)
                said(file, shown)
                if _ended(shown):
                    return file, shown
                sleep(seconds)
        except KeyboardInterrupt:
            return self.write()  # a page that does not wait for another


def default_out(runs: Sequence[Run]) -> Path:
    """In the run's folder; of several runs, in the folder one stands in."""
    return runs[0].folder.path / "report.html" if len(runs) == 1 else Path("report.html")


def numbers(file: Path, shown: Document) -> dict[str, Any]:
    """What `--json` prints."""
    return {**shown.numbers, "page": str(file)}


class Spoken:
    """Says each line once: what a page shows, and what is wrong with the files."""

    def __init__(self, errors: TextIO, out: TextIO) -> None:
        self._errors, self._out = errors, out
        self._said: set[str] = set()

    def say(self, file: Path, shown: Document) -> None:
        """Of one page that was written."""
        for line in warnings(shown):
            self._line(f"minka: {line}", self._errors)
        for line in lines(shown):
            self._line(line, self._out)
        self._line(str(file), self._out)

    def _line(self, line: str, to: TextIO) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, file=to, flush=True)


def lines(shown: Document) -> list[str]:
    """A line a run for people."""
    out = []
    for run, told in zip(shown.page["runs"], shown.numbers["runs"], strict=True):
        plan, loss, best = told["plan"], told["loss"], told["best"]
        of = f" of {plan['steps']:,}" if plan else ""
        words = [f"{run['name']}: {run['state']['label']}", f"step {told['step']:,}{of}"]
        words += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
        words += [f"best {best['value']:.4f} bits per byte"] if best else []
        out.append(", ".join(words))
    return out


def warnings(shown: Document) -> list[str]:
    """What is wrong with the files, a line each."""
    out = []
    for told in shown.numbers["runs"]:
        torn = told["torn_lines"]
        if torn:
            some = ", ".join(map(str, torn[:10])) + (f" and {len(torn) - 10:,} more" if len(torn) > 10 else "")
            which = f"line {some} is" if len(torn) == 1 else f"lines {some} are"
            out.append(f"{told['path']}/ledger.jsonl: {which} cut off or mangled, left out")
        out += told["notes"]
    return out


def _ended(shown: Document) -> bool:
    return all(state.ended for state in shown.states)


def _once(runs: Sequence[Run]) -> list[Run]:
    return list({run.folder.path.resolve(): run for run in runs}.values())
