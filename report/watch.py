"""`minka report --watch`: writes the page again and again until every run has ended."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minka.report.page_data import PageData, ended
from minka.report.write_report import write_report


def watch(
    names: Sequence[str],
    out: Path | None,
    seconds: float,
    announce: Callable[[Path, PageData], None],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Path, PageData]:
    """Write the page every `seconds` until every run has ended, or Ctrl-C. `announce` is called after each write."""
    try:
        while True:
            file, data = write_report(names, out, seconds)
            announce(file, data)
            if ended(data):
                return file, data
            sleep(seconds)
    except KeyboardInterrupt:
        return write_report(names, out)  # the last page does not reload itself
