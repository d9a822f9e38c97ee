"""Sources: every input format gives its documents once, exactly, in one order, with their provenance."""

import gzip
import platform
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from corpora import data_section, texts, write_jsonl
from minka.data.corpus_files import expand_paths
from minka.data.document import Document
from minka.data.read_documents import read_documents
from minka.data.text_sources import stdlib_names

TEXTS = texts(12)


def read(**fields: Any) -> list[Document]:
    """The documents of a corpus."""
    return list(read_documents(data_section(**fields)))


def test_the_standard_library_is_read_whole_in_order_without_tests() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = read(source="stdlib")
    names = [document.path for document in documents]
    assert names == sorted(names) == stdlib_names(root)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    first = next(document for document in documents if document.path == "json/decoder.py")
    assert first.text.encode() == (root / "json" / "decoder.py").read_bytes()
    assert (first.id, first.source, first.package) == ("stdlib:json/decoder.py", "stdlib", "cpython")
    assert (first.version, first.licence) == (platform.python_version(), "PSF-2.0")


def test_files_folders_and_globs_of_text_are_each_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    folder = str(tmp_path)
    assert [d.text for d in read(source="text", paths=[folder])] == [
        "text of a.md\r\n",
        "text of b.txt\r\n",
        "text of deep/c.txt\r\n",
    ]
    globbed = read(source="text", paths=[f"{folder}/**/*.txt", folder])
    assert [Path(d.path).name for d in globbed] == ["b.txt", "c.txt", "a.md"]
    assert read(source="text", paths=[f"{folder}/a.md"])[0].id == f"{folder}/a.md"


def test_newlines_and_nulls_of_a_file_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    raw = "one\r\ntwo\rthree\n\x00\u2028\ufeffend".encode()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + raw)
    (document,) = read(source="text", paths=[str(tmp_path)])
    assert document.raw == raw


def test_a_byte_order_mark_before_json_is_not_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}')
    assert [d.text for d in read(source="jsonl", paths=[str(tmp_path)])] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_is_read_plain_and_compressed_with_file_and_line(suffix: str, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "x", [{"text": t, "license": "CC0"} for t in TEXTS]).read_bytes()
    plain = plain.replace(b"\n", b"\n\n", 1)  # an empty line is not a document, but it counts as a line
    half = len(plain) // 2
    packed = {
        ".jsonl": plain,
        ".jsonl.gz": gzip.compress(plain[:half]) + gzip.compress(plain[half:]),
        ".jsonl.zst": zstandard.compress(plain[:half]) + zstandard.compress(plain[half:]),  # two frames
    }[suffix]
    file = tmp_path / f"a{suffix}"
    file.write_bytes(packed)
    documents = read(source="jsonl", paths=[str(tmp_path)])
    assert [d.text for d in documents] == TEXTS
    assert [d.line for d in documents] == [1, *range(3, 14)]
    assert documents[1].id == f"{file}:3"
    assert (documents[0].source, documents[0].licence, documents[0].path) == ("jsonl", "CC0", str(file))


def test_rows_name_their_own_provenance(tmp_path: Path) -> None:
    row = {
        "text": "x",
        "id": 7,
        "source": "wiki",
        "url": "https://x.test",
        "licence": "MIT",
        "version": "2",
        "more": [],
    }
    (document,) = read(source="jsonl", paths=[str(write_jsonl(tmp_path / "a.jsonl", [row]))])
    assert (document.id, document.source, document.url) == ("7", "wiki", "https://x.test")
    assert (document.licence, document.version, document.line) == ("MIT", "2", 1)


def test_parquet_is_read_with_its_provenance_columns(tmp_path: Path) -> None:
    table = pa.table({"body": TEXTS, "url": [f"https://x.test/{i}" for i in range(12)], "other": list(range(12))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    documents = read(source="parquet", paths=[str(tmp_path)], text_field="body")
    assert [d.text for d in documents] == TEXTS
    assert [(d.line, d.url) for d in documents] == [(i + 1, f"https://x.test/{i}") for i in range(12)]


@pytest.mark.parametrize("saved", [True, False])
def test_what_datasets_opens_is_read(saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text, "source": "hub"} for text in TEXTS]
    if saved:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        fields: dict[str, Any] = {"dataset": str(tmp_path / "saved")}
    else:
        fields = {"dataset": "json", "paths": [str(write_jsonl(tmp_path / "a.jsonl", rows))]}
    documents = read(source="datasets", **fields)
    assert [d.text for d in documents] == TEXTS
    assert [(d.line, d.source) for d in documents] == [(i + 1, "hub") for i in range(12)]


def test_max_bytes_reads_whole_documents_until_the_next_would_pass_it(tmp_path: Path) -> None:
    rows = [{"text": "a" * 10}, {"text": "b" * 10}, {"text": "é" * 5}, {"text": "c"}]
    paths = [str(write_jsonl(tmp_path / "a.jsonl", rows))]
    sizes = {limit: len(read(source="jsonl", paths=paths, max_bytes=limit)) for limit in (0, 9, 10, 29, 30, 31)}
    assert sizes == {0: 4, 9: 0, 10: 1, 29: 2, 30: 3, 31: 4}


def test_an_entry_of_paths_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert expand_paths(["~/a.txt"]).files == [tmp_path / "a.txt"]
