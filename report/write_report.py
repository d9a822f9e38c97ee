"""Reads runs and writes their page, once or (`--watch`) again and again until every run has ended."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minka.plan.atomic import write_text, writing
from minka.plan.errors import UserError
from minka.report.assemble_html import MARK, assemble_html, plotly_script
from minka.report.page_data import PageData, ended, page_data
from minka.report.run_files import RunFiles


def write_report(
    names: Sequence[str], out: Path | None, refresh_seconds: float = 0.0, now: float | None = None
) -> tuple[Path, PageData]:
    """Read the runs, write their page, and return its file and its data. Raises UserError if a run does not exist.

    `out`: None writes report.html into the run's folder, or into this folder for several runs.
    """
    runs = list({run.folder.path.resolve(): run for run in map(RunFiles, names)}.values())
    data = page_data(runs, time.time() if now is None else now)
    file = out or (runs[0].folder.path if len(runs) == 1 else Path()) / "report.html"
    write_page(file, assemble_html(data, plotly_script(), 0.0 if ended(data) else refresh_seconds))
    return file, data


def watch_runs(
    names: Sequence[str], out: Path | None, seconds: float, announce: Callable[[Path, PageData], None]
) -> tuple[Path, PageData]:
    """Write the page every `seconds` until every run has ended, or Ctrl-C. `announce` is called after each write."""
    try:
        while True:
            file, data = write_report(names, out, seconds)
            announce(file, data)
            if ended(data):
                return file, data
            time.sleep(seconds)
    except KeyboardInterrupt:
        return write_report(names, out)  # the last page does not reload itself


def write_page(file: Path, text: str) -> None:
    """Replace `file` with the page, atomically. Raises UserError if the existing file is not a report."""
    with writing(file, "choose a different place: --out FILE.html"):
        if file.exists() and not (file.is_file() and MARK.encode() in file.read_bytes()[:1000]):
            raise UserError(
                "this file exists and is not a report, and a report replaces only reports",
                where=str(file),
                remedy="choose a different --out, or move the file",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
