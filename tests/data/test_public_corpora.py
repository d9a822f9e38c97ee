"""Small files in the form of well-known corpora are read with the settings that docs/data.md gives for them."""

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from corpora import texts
from minka.data.read_documents import read_documents
from minka.plan.load_config import load_run

TEXTS = texts(6)


def web(i: int) -> dict[str, Any]:
    """What rows of web text have in common."""
    return {"text": TEXTS[i], "url": f"https://x.test/{i}"}


ROWS: dict[str, Callable[[int], Any]] = {
    "FineWeb, FineWeb-Edu": lambda i: {**web(i), "id": f"<urn:uuid:{i}>", "dump": "CC-MAIN-2024-10", "token_count": 9},
    "C4, mC4 (`.json.gz`)": lambda i: {**web(i), "timestamp": "2019-04-25T12:57:54Z"},
    "Dolma (`.json.gz`)": lambda i: {
        "id": str(i),
        "text": TEXTS[i],
        "source": "common-crawl",
        "added": "2023-04-11",
        "created": "2020-01-17",
        "metadata": {"url": f"https://x.test/{i}"},
    },
    "The Pile (`.jsonl.zst`)": lambda i: {"text": TEXTS[i], "meta": {"pile_set_name": "Pile-CC"}},
    "SlimPajama (`.jsonl.zst`)": lambda i: {"text": TEXTS[i], "meta": {"redpajama_set_name": "RedPajamaC4"}},
    "RedPajama 2 (`.json.gz`)": lambda i: {"raw_content": TEXTS[i], "url": "https://x.test", "nlines": 3},
    "Wikipedia": lambda i: {**web(i), "id": str(i), "title": "T"},
    "The Stack": lambda i: {"content": TEXTS[i], "lang": "Python", "max_stars_repo_licenses": ["MIT"], "size": 9},
    "OpenAI chats": lambda i: {"messages": [{"role": "user", "content": TEXTS[i]}]},
    "TinyStories (`.txt`)": lambda i: f"Once upon a time {i}.\n\nThe end.",
}
SOURCE = {
    "FineWeb, FineWeb-Edu": "CC-MAIN-2024-10",
    "Dolma (`.json.gz`)": "common-crawl",
    "The Pile (`.jsonl.zst`)": "Pile-CC",
    "SlimPajama (`.jsonl.zst`)": "RedPajamaC4",
    "The Stack": "Python",
}


def settings(root: Path) -> dict[str, list[str]]:
    """The settings of each corpus in the table of the guide, as a shell would pass them."""
    found = re.findall(r"^\| ([^|]+) \| `([^\n]*data\.source=[^\n]*)` \|$", (root / "docs/data.md").read_text(), re.M)
    return {name: shlex.split(line.replace("\\|", "|")) for name, line in found}


def write(name: str, folder: Path) -> None:
    """The corpus as its publisher packs it."""
    rows = [ROWS[name](i) for i in range(len(TEXTS))]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name in ("FineWeb, FineWeb-Edu", "Wikipedia", "The Stack"):
        pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00041.parquet")
    elif "json.gz" in name:
        (folder / "part-00000.json.gz").write_bytes(gzip.compress(lines))
    elif "zst" in name:
        (folder / "00.jsonl.zst").write_bytes(zstandard.compress(lines))
    elif "txt" in name:
        (folder / "train.txt").write_text("\n<|endoftext|>\n".join(rows), encoding="utf-8")
    else:
        (folder / "chats.jsonl").write_bytes(lines)


def test_the_guide_lists_the_corpora_that_are_tried(root: Path) -> None:
    assert settings(root).keys() == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_corpus_is_read_with_the_settings_of_the_guide(name: str, root: Path, tmp_path: Path) -> None:
    write(name, tmp_path)
    config = load_run("demo", [*settings(root)[name], f"data.paths={tmp_path}"]).config
    found = list(read_documents(config.data))
    assert {document.source for document in found} == {SOURCE.get(name, config.data.source)}
    rows = [ROWS[name](i) for i in range(len(TEXTS))]
    if "txt" in name:
        assert [document.text for document in found] == rows
        return
    assert [document.text for document in found] == TEXTS
    for document, row in zip(found, rows, strict=True):
        assert document.url == row.get("url", "")
        assert document.id == row.get("id", f"{document.path}:{document.line}")
