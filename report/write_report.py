"""Reads runs and writes their page."""

import time
from collections.abc import Sequence
from pathlib import Path

from minka.plan.atomic import write_text, writing
from minka.plan.errors import UserError
from minka.report.assemble_html import MARK, assemble_html, plotly_script
from minka.report.page_data import PageData, ended, page_data
from minka.report.run_files import read_run_files


def write_report(
    names: Sequence[str], out: Path | None, refresh_seconds: float = 0.0, now: float | None = None
) -> tuple[Path, PageData]:
    """Read the runs, write their page, and return its file and its data. Raises UserError if a run does not exist.

    `out`: None writes report.html into the run's folder, or into this folder for several runs.
    """
    found = [read_run_files(name) for name in names]
    runs = list({run.folder.path.resolve(): run for run in found}.values())
    data = page_data(runs, time.time() if now is None else now)
    default = runs[0].folder.path if len(runs) == 1 else Path()
    file = out or default / "report.html"
    write_page(file, assemble_html(data, plotly_script(), 0.0 if ended(data) else refresh_seconds))
    return file, data


def write_page(file: Path, text: str) -> None:
    """Replace `file` with the page, atomically. Raises UserError if the existing file is not a report."""
    if file.exists() and not _is_report(file):
        raise UserError(
            "this file exists and is not a report",
            where=str(file),
            why="a report replaces only reports",
            remedy="choose a different --out, or move the file",
        )
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def _is_report(file: Path) -> bool:
    try:
        with file.open("rb") as page:
            return MARK.encode() in page.read(1000)
    except OSError:
        return False
