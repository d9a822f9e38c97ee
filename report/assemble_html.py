"""Puts the HTML together: one file with text, style, scripts, data, and plotly's script, compressed."""

import base64
import functools
import gzip
import html
import importlib.util
import json
import secrets
from pathlib import Path
from string import Template
from typing import Any

from minka.plan.errors import UserError
from minka.plan.ledger import finite

HERE = Path(__file__).parent
SCRIPTS = ("formatting.js", "elements.js", "plots.js", "tables.js", "lineage.js", "page.js")
MARK = '<meta name="generator" content="minka report">'


def assemble_html(data: dict[str, Any], plotly: str, refresh_seconds: float = 0.0) -> str:
    """Return the page. It reloads itself every `refresh_seconds`; 0 = never."""
    runs = [run["name"] for run in data["runs"]]
    return Template(_text("page.html")).substitute(
        mark=MARK,
        nonce=secrets.token_urlsafe(16),  # only our own scripts may run, whatever is in the data
        title=html.escape(f"{', '.join(runs)} · minka report"),
        style=_text("page.css"),
        script="\n".join(map(_text, SCRIPTS)),
        data=embed_json({**data, "refresh_seconds": refresh_seconds}),
        plotly=plotly,
    )


@functools.cache
def plotly_script() -> str:
    """Return plotly's script from the installed package, as gzip in base64. Raises UserError if it is not there."""
    package = importlib.util.find_spec("plotly")  # found, not imported: the import takes a second
    folders = package.submodule_search_locations if package else None
    file = Path(next(iter(folders or ["plotly"]))) / "package_data" / "plotly.min.js"
    try:
        return base64.b64encode(gzip.compress(file.read_bytes(), mtime=0)).decode()
    except OSError as error:
        raise UserError(
            f"plotly's script, which draws the page, cannot be read: {error.strerror}",
            where=str(file),
            remedy="install plotly again: pip install 'plotly>=6'",
        ) from None


def embed_json(value: object) -> str:
    """Return JSON for a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))  # ASCII: no U+2028 either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
