"""One HTML file that needs nothing else: text, style, scripts, the data, and plotly's own script, compressed."""

import base64
import gzip
import html
import importlib.util
import json
import secrets
from pathlib import Path
from string import Template
from typing import Any

from minka.plan.atomic import write_text, writing
from minka.plan.errors import UserError
from minka.plan.ledger import finite

HERE = Path(__file__).parent
SCRIPTS = ("base.js", "plots.js", "tables.js", "lineage.js", "page.js")
MARK = '<meta name="generator" content="minka report">'


def plotly_script() -> str:
    """plotly's script as gzip in base64, from the installed package. Raises UserError where there is none."""
    package = importlib.util.find_spec("plotly")  # found, not imported: that takes a second
    places = package.submodule_search_locations if package else None
    file = Path(next(iter(places or ["plotly"]))) / "package_data" / "plotly.min.js"
    try:
        return base64.b64encode(gzip.compress(file.read_bytes(), mtime=0)).decode()
    except OSError as error:
        raise UserError(
            f"plotly's script cannot be read: {error.strerror}",
            where=str(file),
            why="the page draws with it, and carries it along",
            remedy="install it again: pip install 'plotly>=6'",
        ) from None


def page(data: dict[str, Any], plotly: str, refresh_seconds: float = 0.0) -> str:
    """The page. It loads itself again every `refresh_seconds`; 0 = never."""
    runs = [run["name"] for run in data["runs"]]
    nonce = secrets.token_urlsafe(16)  # nothing but our own scripts may run, whatever stands in the data
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        mark=MARK,
        nonce=nonce,
        title=html.escape(f"{', '.join(runs)} · minka report"),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script="\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        data=embedded({**data, "refresh_seconds": refresh_seconds}),
        plotly=plotly,
    )


def embedded(value: object) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))  # ASCII: no U+2028 either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(file: Path, text: str) -> None:
    """Replace `file` by the page, in one piece. Raises UserError for what is there and is no report."""
    if file.exists() and not _is_report(file):
        raise UserError(
            "there is a file, and it is no report",
            where=str(file),
            why="a report replaces only reports",
            remedy="choose another --out, or move what is there",
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
