"""Text files as many documents: cut at a separator or by size, exactly, in bounded memory, in one way."""

import gzip
import io
import random
from pathlib import Path

import pytest

import minka.data.split_text as split_module
from corpora import data_section
from minka.data.document import Document
from minka.data.read_documents import read_documents
from minka.data.split_text import TextPiece, split_text
from minka.plan.errors import UserError

STORY = "Once upon a time, データ.\r\nThe end."


def cut(text: str | bytes, separator: str = "", chunk: int = 0) -> list[TextPiece]:
    """The pieces of a text."""
    raw = text.encode() if isinstance(text, str) else text
    return list(split_text(io.BytesIO(raw), separator.encode(), chunk, "x.txt"))


def documents(path: Path, **fields: object) -> list[Document]:
    """The documents of a text file."""
    return list(read_documents(data_section(source="text", paths=[str(path)], **fields)))


@pytest.mark.parametrize("around", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("last", [False, True])
def test_a_separator_and_the_newlines_around_it_are_in_no_document(around: str, last: bool) -> None:
    separator = f"{around}<|endoftext|>{around}"
    text = separator.join([STORY] * 3) + (separator if last else "")
    pieces = cut(text, "<|endoftext|>")
    assert [piece.raw.decode() for piece in pieces if piece.raw] == [STORY] * 3
    for piece in pieces:
        assert text.encode()[piece.offset :].startswith(piece.raw)
        assert piece.line == 1 + text.encode()[: piece.offset].count(b"\n")


def test_a_separator_is_taken_literally() -> None:
    assert [piece.raw for piece in cut("a.b\n\n\nc*\n\nd", "\n\n\n")] == [b"a.b", b"c*\n\nd"]
    assert [piece.raw for piece in cut("axb.c", ".")] == [b"axb", b"c"]


@pytest.mark.parametrize("seed", range(8))
def test_blocks_do_not_decide_where_a_text_is_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any size of block gives the cuts of the whole text; chunks lose no byte and no character."""
    source = random.Random(seed)
    text = "".join(source.choices(["word ", "データ", "\n", "=-", "=-=", "a" * 40], k=400))
    for separator, chunk in (("=-=", 0), ("=-=", 64), ("", 64), ("=-=", 100)):
        monkeypatch.setattr(split_module, "BLOCK_BYTES", 2**20)
        whole = cut(text, separator, chunk)
        for block in (1, 7, 63, 128):
            monkeypatch.setattr(split_module, "BLOCK_BYTES", block)
            assert cut(text, separator, chunk) == whole
        assert not chunk or max(len(piece.raw) for piece in whole) <= chunk
        assert all(piece.raw.decode().encode() == piece.raw for piece in whole)
        if not separator:
            assert b"".join(piece.raw for piece in whole) == text.encode()


def test_a_chunk_ends_after_a_line_or_a_word_where_there_is_one() -> None:
    lines = cut("line of text\n" * 20, chunk=64)
    assert {piece.raw[-1:] for piece in lines} == {b"\n"}
    assert {piece.raw[-1:] for piece in cut("word " * 50, chunk=64)} == {b" "}
    assert [len(piece.raw) for piece in cut("é" * 100, chunk=65)] == [64, 64, 64, 8]


class Endless(io.RawIOBase):
    """A stream that never ends."""

    read_bytes = 0

    def read(self, size: int = -1) -> bytes:
        self.read_bytes += size
        return (b"one line of text\n" * (size // 17 + 1))[:size]


@pytest.mark.parametrize(("separator", "chunk"), [(b"\n", 0), (b"", 1000), (b"not there", 1000)])
def test_a_file_of_any_size_is_read_in_pieces(separator: bytes, chunk: int) -> None:
    stream = Endless()
    pieces = split_text(stream, separator, chunk, "x.txt")  # type: ignore[arg-type]
    assert all(0 < len(next(pieces).raw) <= 1000 for _ in range(100))
    assert stream.read_bytes == split_module.BLOCK_BYTES


def test_a_document_that_is_too_large_is_refused_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "LARGEST_DOCUMENT", 10 * split_module.BLOCK_BYTES)
    stream = Endless()
    with pytest.raises(UserError) as refusal:
        next(split_text(stream, b"", 0, "x.txt"))  # type: ignore[arg-type]
    assert refusal.value.where == "x.txt:1"
    assert "data.split_on=" in refusal.value.remedy
    assert stream.read_bytes == 11 * split_module.BLOCK_BYTES


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_of_a_file_say_where_they_begin(packed: bool, tmp_path: Path) -> None:
    raw = "\n<|endoftext|>\n".join(f"{i} {STORY}" for i in range(3)).encode("utf-8-sig")
    path = tmp_path / "stories.txt"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    found = documents(path, split_on="<|endoftext|>")
    assert [document.text for document in found] == [f"{i} {STORY}" for i in range(3)]
    assert [document.line for document in found] == [1, 4, 7]
    start = raw.index(b"1 Once") - 3  # the byte-order mark is not part of the text
    assert (found[1].id, found[1].path) == (f"{path}@{start}", str(path))


def test_a_separator_that_occurs_nowhere_is_refused_with_how_it_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(UserError) as refusal:
        documents(tmp_path, split_on="\\n\\n")  # what a shell makes of data.split_on="\n\n"
    assert "'data.split_on=\"\\n\\n\"'" in refusal.value.remedy
    assert [document.text for document in documents(tmp_path, split_on="\n\n")] == ["one", "two"]


def test_pieces_are_for_text_and_not_smaller_than_a_sentence() -> None:
    for fields in ({"source": "jsonl", "split_on": "x"}, {"source": "text", "chunk_bytes": 8}):
        with pytest.raises(ValueError, match="chunk_bytes"):
            data_section(paths=["x"], **fields)
