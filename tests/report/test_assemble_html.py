"""The page is one file without outside references, and no text of a run can break out of its data."""

import base64
import gzip
import html
import json
import re
from pathlib import Path

from ledgers import event, run_of, start, steps
from minka.report.assemble_html import HERE, SCRIPTS, assemble_html, embed_json, plotly_script
from minka.report.page_data import page_data
from minka.report.run_files import RunFiles

EVIL = "</script><script>window.pwned=1</script><!--<img src=x onerror='window.pwned=1'>&amp;\u2028"


def page_of(folder: Path) -> str:
    return assemble_html(page_data([RunFiles(str(folder))], 1_700_000_100.0), plotly="")


def test_data_cannot_end_its_script_and_comes_back_unchanged() -> None:
    text = embed_json({EVIL: [EVIL, float("inf")]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {EVIL: [EVIL, "Infinity"]}


def test_text_of_a_run_is_only_in_the_data_and_the_title_is_escaped(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "")
    folder = run_of(tmp_path, evil, [start(device=EVIL), *steps(1, 2), event("stop", 2, reason=EVIL)])
    text = page_of(folder.path)
    assert (text.count("<script"), text.count("</script")) == (3, 3)
    title = re.findall("<title>(.*)</title>", text)
    assert title == [f"{html.escape(evil)} · minka report"]
    assert "pwned" not in re.sub(r'<title>.*</title>|<script type="application/json".*?</script>', "", text)


def test_plotly_is_in_the_page_whole(tmp_path: Path) -> None:
    script = gzip.decompress(base64.b64decode(plotly_script()))
    assert len(script) > 1_000_000
    assert b"plotly.js v" in script[:200]


def test_nothing_in_the_page_points_outside(tmp_path: Path) -> None:
    text = page_of(run_of(tmp_path, "a", [start(), *steps(1, 2)]).path)
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_every_file_of_the_page_is_in_it(tmp_path: Path) -> None:
    assert {path.name for path in HERE.iterdir() if path.suffix in (".js", ".css", ".html")} == {
        *SCRIPTS,
        "page.css",
        "page.html",
    }
    text = page_of(run_of(tmp_path, "a", []).path)
    for name in (*SCRIPTS, "page.css"):
        assert (HERE / name).read_text() in text
