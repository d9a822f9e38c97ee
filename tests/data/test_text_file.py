"""Text files are recognised by their content: decompressed and decoded under any name, or described and refused."""

import bz2
import gzip
import json
import lzma
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import zstandard

from corpora import data_section, texts, write_jsonl
from minka.data.read_documents import read_documents
from minka.plan.errors import UserError

TEXTS = texts(30)
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
RAW = LINES.encode()
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"size"  # pzstd writes such frames


def long_zstd(raw: bytes) -> bytes:
    """A frame whose header asks for a window of 2 GiB, as `zstd --ultra --long=31` writes it; made without as much."""
    packer = zstandard.ZstdCompressor().compressobj()
    frame = bytearray(packer.compress(raw) + packer.flush())
    assert not frame[4] & 0b0010_0000  # not a single segment: the next byte describes the window
    frame[5] = (31 - 10) << 3  # RFC 8878, 3.1.1.1.2
    return bytes(frame)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda raw: lzma.compress(raw, format=lzma.FORMAT_ALONE),
    "zstd": zstandard.compress,
    "zstd-long": long_zstd,
    "pzstd": lambda raw: SKIPPABLE + zstandard.compress(raw),
    "twice": lambda raw: gzip.compress(zstandard.compress(raw)),
}


def read(path: Path, source: str = "jsonl", **fields: Any) -> list[str]:
    """The texts of a corpus of one file."""
    return [document.text for document in read_documents(data_section(source=source, paths=[str(path)], **fields))]


def refused(path: Path, raw: bytes, source: str = "jsonl") -> UserError:
    """The error of a file with this content."""
    path.write_bytes(raw)
    with pytest.raises(UserError) as refusal:
        read(path, source)
    assert str(path) in refusal.value.where
    return refusal.value


@pytest.mark.parametrize("kind", PACK)
def test_compressed_text_is_read_under_any_name(kind: str, tmp_path: Path) -> None:
    half = len(RAW) // 2
    packed = PACK[kind](RAW[:half]) + bytes(8) + PACK[kind](RAW[half:])  # two members, zeros between them
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt.zstd", "a"):
        (tmp_path / name).write_bytes(packed)
        assert read(tmp_path / name) == TEXTS
    (tmp_path / "a.txt.gz").write_bytes(PACK[kind]("naïve\r\n".encode()))
    assert read(tmp_path / "a.txt.gz", "text") == ["naïve\r\n"]


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("cut", [1, 10, 0.5, -13])
def test_a_compressed_file_that_is_cut_off_is_never_read_as_if_it_were_whole(
    kind: str, cut: float, tmp_path: Path
) -> None:
    packed = PACK[kind](RAW * 5)
    length = -cut if cut < 0 else len(packed) * cut if cut < 1 else len(packed) - cut
    error = refused(tmp_path / "a.jsonl", packed[: int(length)])
    assert "copy it again" in error.remedy


def test_a_damaged_second_member_is_not_left_out_silently(tmp_path: Path) -> None:
    for kind, pack in PACK.items():
        for garbage in (b"garbage after the end", pack(RAW)[4:]):
            assert "copy it again" in refused(tmp_path / f"{kind}.jsonl", pack(RAW) + garbage).remedy


def test_a_damaged_file_says_how_much_of_it_could_be_read(tmp_path: Path) -> None:
    many = b"".join(json.dumps({"text": f"{i} {random.Random(i).random()}"}).encode() + b"\n" for i in range(20_000))
    error = refused(tmp_path / "a.jsonl.zst", zstandard.compress(many)[:-100])
    lines = int(error.why.split(" has ")[1].split()[0].replace(",", ""))
    assert 10_000 < lines < 20_000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_decides_the_encoding(encoding: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    marked = LINES if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff" + LINES
    (tmp_path / "a.jsonl").write_bytes(pack(marked.encode(encoding)))
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_an_encoding_without_a_mark_is_refused_with_its_conversion(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chinese = json.dumps({"text": "数据" * 999}, ensure_ascii=False)  # hardly a zero in UTF-16
    for text in (LINES, chinese):
        assert f"iconv -f {encoding} -t UTF-8 {path} > NEW" in refused(path, text.encode(encoding)).remedy


@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_binary_data_is_called_that_and_never_converted(source: str, tmp_path: Path) -> None:
    for raw in (random.Random(0).randbytes(5000), bytes(random.Random(1).choices(range(16), k=999)) + b"\xff"):
        error = refused(tmp_path / "a.jsonl", raw, source)
        assert "binary" in error.what
        assert "iconv" not in str(error)


def archive(kind: str, folder: Path) -> bytes:
    """The bytes of a file that is not text."""
    table = pa.table({"text": TEXTS})
    if kind == "Parquet":
        pq.write_table(table, folder / "x")
    elif kind == "Arrow":
        feather.write_feather(table, str(folder / "x"))
    return (folder / "x").read_bytes()


@pytest.mark.parametrize(
    ("raw", "what", "remedy"),
    [
        ("Parquet", "Parquet", "data.source=parquet"),
        ("Arrow", "Arrow", "data.source=datasets data.dataset=arrow"),
        (b"PK\x03\x04" + bytes(99), "ZIP", "unzip"),
        (bytes(257) + b"ustar" + bytes(250), "tar", "tar -xf"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip", "7z x"),
        (b"\x04\x22\x4d\x18" + bytes(99), "LZ4", "lz4 -d"),
        (b"%PDF-1.7\n", "PDF", "extract"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_file_that_is_not_text_is_described_with_what_reads_it(
    raw: str | bytes, what: str, remedy: str, source: str, tmp_path: Path
) -> None:
    content = archive(raw, tmp_path) if isinstance(raw, str) else raw
    for content in (content, gzip.compress(content)):  # noqa: B020
        error = refused(tmp_path / "a.txt", content, source)
        assert what in error.what
        assert remedy in error.remedy
        assert "iconv" not in str(error)


@pytest.mark.parametrize(
    "start", ["PARENTS", "PAR1S", "ORCHESTRA", "LZIP is a format", "ARROW1", "Objects", "O" * 257 + "ustar"]
)
def test_a_text_that_begins_with_the_letters_of_a_magic_is_text(start: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{start} and more")
    assert read(tmp_path / "a.txt", "text") == [f"{start} and more"]


@pytest.mark.parametrize("column", ["x" * 9000, "words " * 2000])
def test_parquet_and_orc_of_long_texts_are_still_recognised(column: str, tmp_path: Path) -> None:
    table = pa.table({"text": [column] * 3})
    pq.write_table(table, tmp_path / "a", compression="none", use_dictionary=False, write_statistics=False)
    assert "Parquet" in refused(tmp_path / "a", (tmp_path / "a").read_bytes(), "text").what
    orc.write_table(table, str(tmp_path / "b"), compression="uncompressed")
    assert "ORC" in refused(tmp_path / "b", (tmp_path / "b").read_bytes(), "text").what


@pytest.mark.parametrize(
    ("raw", "what", "remedy"),
    [
        (json.dumps([{"text": "x"}], indent=1).encode(), "one JSON document", "jq -c '.[]'"),
        (b'[{"text": "x"},{"text": "y"}]', "one JSON document", "jq -c '.[]'"),
        (b'{\n "text": "x"\n}\n{\n "text": "y"\n}', "one JSON document", "jq -c '.'"),
        (b"text,id\nx,1\n", "CSV", "data.source=datasets data.dataset=csv"),
        (b"text\tid\nx\t1\n", "TSV", "--itsv --ojsonl"),
        (b"<!DOCTYPE html>\n", "HTML", "the data itself"),
    ],
)
def test_text_that_is_not_json_lines_is_described_with_what_reads_it(
    raw: bytes, what: str, remedy: str, tmp_path: Path
) -> None:
    error = refused(tmp_path / "a.jsonl", raw)
    assert what in error.what
    assert remedy in error.remedy


def test_what_the_errors_name_reads_these_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    feather.write_feather(pa.table({"text": TEXTS}), str(tmp_path / "a.arrow"))
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2,two\n")
    assert read(tmp_path / "a.json", "datasets", dataset="json") == TEXTS
    assert read(tmp_path / "a.arrow", "datasets", dataset="arrow") == TEXTS
    assert read(tmp_path / "a.csv", "datasets", dataset="csv") == ["one", "two"]


def test_json_lines_are_not_trained_on_as_text(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl.gz"):
        assert "data.source=jsonl" in refused(tmp_path / name, RAW, "text").remedy
    (tmp_path / "package.json").write_text('{"name": "x"}\n')
    assert read(tmp_path / "package.json", "text") == ['{"name": "x"}\n']


@pytest.mark.parametrize(
    ("raw", "what", "remedy"),
    [
        (RAW, "JSON", "data.source=jsonl"),
        (gzip.compress(RAW), "JSON", "data.source=jsonl"),
        (b"words", "text", "data.source=text"),
        (b"", "empty", "copy it again"),
        ("Arrow", "Arrow", "data.dataset=arrow"),
        ("Parquet", "compressed", "decompress"),
    ],
)
def test_a_file_that_is_not_parquet_is_described(raw: str | bytes, what: str, remedy: str, tmp_path: Path) -> None:
    content = archive(raw, tmp_path) if isinstance(raw, str) else raw
    error = refused(tmp_path / "a.parquet", gzip.compress(content) if raw == "Parquet" else content, "parquet")
    assert what in error.what
    assert remedy in error.remedy


def test_empty_files_are_an_empty_part_of_a_corpus(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    assert read(tmp_path) == ["x"]
