"""Rows as documents: fields named by paths, provenance, and bad rows, which are refused or skipped and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import data_section, run_config, texts, write_jsonl
from minka.data.command import main
from minka.data.document import Document
from minka.data.prepare import check_store, prepare, store_folder
from minka.data.read_documents import read_documents
from minka.data.row_document import find_field
from minka.data.store_manifest import read_manifest
from minka.data.token_store import TokenStore
from minka.plan.errors import UserError

TEXTS = texts(20)
GOOD = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(TEXTS)]
BAD = {
    b"null": "not an object",
    b'"text"': "not an object",
    b"[]": "not an object",
    b"{}": "no 'text'",
    b'{"body": "x"}': "no 'text'",
    b'{"text": null}': "'text' is null, not text",
    b'{"text": 3}': "'text' is int, not text",
    b'{"text": true}': "'text' is true or false, not text",
    b'{"text": ["x"]}': "'text' is a list, not text",
    b'{"text": []}': "'text' is a list, not text",
    b'{"text": {"text": "x"}}': "'text' is an object, not text",
    b"{'text': 'x'}": "not JSON",
    b'{"text": "x"': "not JSON",
    b'{"text": "x"} {"text": "y"}': "not JSON",
    b'{"n": ' + b"9" * 5000 + b"}": "not JSON",
    b"\x00" * 50: "not text",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud83d"}': "the text has half of a surrogate pair",
    b'{"text": "x", "id": "\\udc00"}': "id has half of a surrogate pair",
    b'{"text": "x", "source": "\\ud83d"}': "source has half of a surrogate pair",
    b'{"text": "x", "url": "\\ud83d"}': "url has half of a surrogate pair",
    b'{"text": "x", "license": "\\ud83d"}': "licence has half of a surrogate pair",
    b'{"text": "x", "package": "\\ud83d"}': "package has half of a surrogate pair",
    b'{"text": "x", "version": "\\ud83d"}': "version has half of a surrogate pair",
}


def corpus(folder: Path, lines: list[bytes]) -> Path:
    """A JSONL file of these lines."""
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "a.jsonl"


def read(path: Path, source: str = "jsonl", **fields: Any) -> list[Document]:
    """The documents of one file."""
    return list(read_documents(data_section(source=source, paths=[str(path)], **fields)))


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_refused_with_its_line_and_the_setting(line: bytes, tmp_path: Path) -> None:
    path = corpus(tmp_path, [*GOOD, line])
    with pytest.raises(UserError) as refusal:
        read(path)
    assert refusal.value.where == f"{path}:21"
    assert "data.bad_rows=skip" in refusal.value.remedy


@pytest.mark.parametrize("first", [False, True])
def test_bad_rows_are_left_out_counted_and_listed(first: bool, tmp_path: Path) -> None:
    lines = [*BAD, *GOOD] if first else [*GOOD, *BAD]
    path = corpus(tmp_path, lines)
    prepare(data_section(source="jsonl", paths=[str(path)], bad_rows="skip"), 256, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    skipped = store.manifest.skipped
    assert skipped
    assert skipped.rows == len(BAD)
    assert skipped.reasons == {reason: list(BAD.values()).count(reason) for reason in BAD.values()}
    assert len(skipped.first) == 20
    assert skipped.first[0].startswith(f"{path}:{1 if first else 21}: ")
    splits = [store.split(name) for name in ("train", "validation")]
    assert sorted(split.text_of(i) for split in splits for i in range(split.n_documents)) == sorted(TEXTS)


def test_the_share_of_bad_rows_is_said_where_the_store_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = corpus(tmp_path, [*GOOD, *[b"null"] * 59, b"{}"])
    overrides = ["data.source=jsonl", f"data.paths={path}", "data.tokenizer=bytes", "model.vocab=256"]
    assert main(["prepare", "demo", *overrides, "data.bad_rows=skip"]) == 0
    said = capsys.readouterr().out
    assert main(["inspect", "demo", *overrides, "data.bad_rows=skip"]) == 0
    for output in (said, capsys.readouterr().out):
        told = " ".join(output.split())
        assert "60 of 80 rows (75 %) were left out as bad (not an object: 59, no 'text': 1); most of the corpus" in told
        assert f"{path}:21: the row is not an object but null" in told
        assert f"{path}:80: the row has no 'text'" in told


def test_a_corpus_of_bad_rows_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = corpus(tmp_path, [b'{"body": "x"}'] * 5)
    with pytest.raises(UserError) as refusal:
        prepare(data_section(source="jsonl", paths=[str(path)], bad_rows="skip"), 256, tmp_path / "store")
    assert "5 of 5 rows (1e+02 %)" not in refusal.value.why
    assert "5 of 5 rows (100 %) were left out as bad (no 'text': 5)" in refusal.value.why


def test_a_missing_field_lists_the_ones_with_text(tmp_path: Path) -> None:
    row = {"doc": {"body": "x", "n": 1}, "lines": ["a"], "messages": [{"role": "user", "content": "hi"}], "n": 3}
    with pytest.raises(UserError) as refusal:
        read(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert "data.text_field to a field with text: doc.body, lines[], messages[].role, messages[].content" in str(
        refusal.value
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(UserError) as refusal:
        read(tmp_path / "a.parquet", "parquet")
    assert "columns: doc.body, lines[], messages[].role, messages[].content" in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("a", "plain"),
        ("b.c", "dotted"),  # a name with a dot comes first
        ("b.d.e", "deep"),
        ("b.x.y", "dotted inside"),
        ("l[]", "one\ntwo"),
        ("l[0]", "one"),
        ("l[-1]", "two"),
        ("m[].content", "hi\nho"),
        ("m[1].content", "ho"),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_path_names_a_field_in_a_field_or_a_list(field: str, found: str, source: str, tmp_path: Path) -> None:
    row = {
        "a": "plain",
        "b.c": "dotted",
        "b": {"c": "nested", "d": {"e": "deep", "other": 1}, "x.y": "dotted inside"},
        "l": ["one", "two"],
        "m": [{"content": "hi", "role": "user"}, {"content": "ho", "role": "assistant"}],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", [row])
    (document,) = read(tmp_path / f"a.{source}", source, text_field=field)
    assert document.text == found


@pytest.mark.parametrize(
    "field", [".", "a.", ".a", "a..b", "a.b.c", "b", "[", "]", "[0]", "l[2]", "l[x]", "l.0", "a[0]"]
)
def test_a_path_that_names_nothing_is_an_error(field: str) -> None:
    row = {"a": {"b": "x"}, "l": ["one", "two"]}
    with pytest.raises(KeyError):
        find_field(row, field)


def binary(values: list[bytes]) -> pa.Array:
    """A column that says it is text, with any bytes."""
    raw = pa.array(values)
    return pa.StringArray.from_buffers(len(values), raw.buffers()[1], raw.buffers()[2])


@pytest.mark.parametrize(
    "column",
    [
        lambda: pa.array(TEXTS, pa.large_string()),
        lambda: pa.array(TEXTS, pa.string_view()),
        lambda: pa.array(TEXTS).dictionary_encode(),
        lambda: pa.array([text.encode() for text in TEXTS]),
        lambda: pa.array([text.encode() for text in TEXTS], pa.large_binary()),
        lambda: binary([text.encode() for text in TEXTS]),
    ],
)
def test_every_kind_of_text_column_is_read(column: Callable[[], pa.Array], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column()}), tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path / "a.parquet", "parquet")] == TEXTS


@pytest.mark.parametrize("bad", [b"caf\xe9", None])
@pytest.mark.parametrize("text_type", [True, False])
def test_a_bad_row_of_a_table_is_one_row(bad: bytes | None, text_type: bool, tmp_path: Path) -> None:
    values = [text.encode() for text in TEXTS]
    values.insert(7, bad)  # type: ignore[arg-type]
    column = binary(values) if text_type and bad else pa.array(values)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", "parquet", bad_rows="skip")
    assert [document.text for document in found] == TEXTS
    assert [document.line for document in found] == [1, 2, 3, 4, 5, 6, 7, *range(9, 22)]
    with pytest.raises(UserError) as refusal:
        read(tmp_path / "a.parquet", "parquet")
    assert refusal.value.where == f"{tmp_path}/a.parquet:8"


def test_of_a_table_only_the_named_parts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    whole = pq.ParquetFile.iter_batches

    def watch(self: pq.ParquetFile, columns: list[str], **more: Any) -> Any:
        asked.append(sorted(columns))
        return whole(self, columns=columns, **more)

    rows = [{"doc": {"text": text, "html": "big"}, "meta": {"set": "A"}, "image": b"big", "url": "u"} for text in TEXTS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch)
    found = read(tmp_path / "a.parquet", "parquet", text_field="doc.text", source_field="meta.set")
    assert asked == [["doc.text", "meta.set", "url"]]
    assert {(document.source, document.url) for document in found} == {("A", "u")}


def test_provenance_is_named_by_paths(tmp_path: Path) -> None:
    row = {"text": "x", "id": "top", "source": "top", "meta": {"set": "A", "n": 7, "urls": ["u", "v"], "licence": None}}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    named = {
        "id_field": "meta.n",
        "source_field": "meta.set",
        "url_field": "meta.urls[]",
        "licence_field": "meta.licence",
    }
    (document,) = read(path, **named)
    assert (document.id, document.source, document.url, document.licence) == ("7", "A", "u, v", "")
    (document,) = read(path)
    assert (document.id, document.source, document.url) == ("top", "top", "")
    for field, what in (("meta.sett", "no 'meta.sett'"), ("meta", "'meta' is an object")):
        with pytest.raises(UserError) as refusal:
            read(path, source_field=field)
        assert what in refusal.value.what
        assert "meta.set" in refusal.value.remedy


PLAIN: dict[str, Any] = {"seq_len": 16, "batch_tokens": 64}


def test_stores_that_were_made_before_keep_their_names() -> None:
    """The names that the version before these settings gave."""
    text: dict[str, Any] = {
        "source": "text",
        "paths": ["corpus"],
        "tokenizer": "bytes",
        "validation_fraction": 0.1,
        **PLAIN,
    }
    rows: dict[str, Any] = {"source": "jsonl", "paths": ["a.jsonl"], **PLAIN}
    names = [store_folder(run_config(data=data), Path()).name for data in (rows, text)]
    assert names == ["jsonl-e6d7139764ca", "text-af5187c59887"]
    changed: list[dict[str, Any]] = [
        {"bad_rows": "skip"},
        {"source_field": "x"},
        {"id_field": "x"},
        {"url_field": "x"},
        {"licence_field": "x"},
    ]
    folders = {store_folder(run_config(data=rows | more), Path()).name for more in changed}
    cut: list[dict[str, Any]] = [{"split_on": "x"}, {"chunk_bytes": 99}]
    folders |= {store_folder(run_config(data=text | more), Path()).name for more in cut}
    assert len(folders - {*names}) == 7


def test_a_store_with_rows_left_out_is_not_the_one_of_a_run_that_refuses_them(tmp_path: Path) -> None:
    data: dict[str, Any] = {"source": "jsonl", "paths": [str(corpus(tmp_path, GOOD))], "tokenizer": "bytes", **PLAIN}
    prepare(data_section(**data, bad_rows="skip"), 256, tmp_path / "skip")
    prepare(data_section(**data), 256, tmp_path / "refuse")
    for made, asked in (("skip", "refuse"), ("refuse", "skip")):
        store = TokenStore.open(tmp_path / made)
        check_store(store, run_config(data=data | {"bad_rows": made}))
        with pytest.raises(UserError, match=r"data\.bad_rows"):
            check_store(store, run_config(data=data | {"bad_rows": asked}))
    plain = json.loads((tmp_path / "refuse" / "manifest.json").read_text())
    assert not {"skipped", "left_out"} & plain.keys()
    assert "bad_rows" not in plain["source"]
    assert read_manifest(tmp_path / "refuse").skipped is None
