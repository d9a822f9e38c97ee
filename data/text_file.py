"""Open a text file by its content, not its name: decompressed, as UTF-8; or an error that says what it is instead."""

import bz2
import codecs
import io
import json
import lzma
import os
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from minka.data.document import BadRow
from minka.plan.errors import UserError
from minka.plan.read_file import first_line

HEAD_BYTES = 4096  # of a file, by which it is recognised
COMPRESSED_BYTES = 16 * 2**10  # fed to a decompressor at once; its output is not bounded
TRANSCODED_BYTES = 2**20
ZSTD_WINDOW = 2**31  # of `zstd --ultra --long=31`, the largest there is
LAYERS = 3  # of compression around one file
MARKS = (  # byte-order marks; UTF-32's little-endian one begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROLS = bytes({*range(32)} - {*b"\t\n\r\f\v\x1b\b"})  # hardly any in text
# What reading a damaged or changed file raises. UnicodeDecodeError: of a file with a byte-order mark of UTF-16 or 32.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, UnicodeDecodeError)


class FileKind(NamedTuple):
    """A kind of file that is not text: its first bytes, what it is, and what to do with {file}."""

    magic: bytes
    name: str
    remedy: str
    at: int = 0


UNPACK = "unpack it, and name the files that were in it: "
ARROW = "it is read with data.source=datasets data.dataset=arrow"
KINDS = (
    FileKind(b"PAR1", "a Parquet file", "it is read with data.source=parquet"),
    FileKind(b"PARE", "an encrypted Parquet file", "decrypt it first"),
    FileKind(b"ARROW1", "an Arrow (Feather) file", ARROW),
    FileKind(b"\xff\xff\xff\xff", "an Arrow stream", ARROW),
    FileKind(b"PK\x03\x04", "a ZIP archive", UNPACK + "unzip {file}"),
    FileKind(b"ustar", "a tar archive", UNPACK + "tar -xf {file}", 257),
    FileKind(b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK + "7z x {file}"),
    FileKind(b"Rar!\x1a\x07", "a RAR archive", UNPACK + "unrar x {file}"),
    FileKind(b"\x04\x22\x4d\x18", "an LZ4 file", UNPACK + "lz4 -d {file}"),
    FileKind(b"\x02\x21\x4c\x18", "an LZ4 file", UNPACK + "lz4 -d {file}"),
    FileKind(b"\xff\x06\x00\x00sNaPpY", "a Snappy file", UNPACK + "snzip -d {file}"),
    FileKind(b"LZIP", "an lzip file", UNPACK + "lzip -d {file}"),
    FileKind(b"\x89LZO", "an LZO file", UNPACK + "lzop -d {file}"),
    FileKind(b"\x1f\x9d", "a file of `compress`", UNPACK + "gunzip {file}"),
    FileKind(b"Obj\x01", "an Avro file", "convert it to Parquet"),
    FileKind(b"ORC", "an ORC file", "convert it to Parquet"),
    FileKind(b"SQLite format 3\x00", "an SQLite database", "export its table as JSONL"),
    FileKind(b"\x89HDF\r\n\x1a\n", "an HDF5 file", "convert it to Parquet"),
    FileKind(b"\x93NUMPY", "a NumPy array", "give the text that it was made from"),
    FileKind(b"%PDF-", "a PDF", "extract its text first"),
    FileKind(b"\x89PNG", "an image", "exclude it with a narrower glob in data.paths"),
    FileKind(b"\xff\xd8\xff", "an image", "exclude it with a narrower glob in data.paths"),
    FileKind(b"\x7fELF", "a program", "exclude it with a narrower glob in data.paths"),
    FileKind(b"version https://git-lfs.github.com/", "a Git LFS pointer, not the data", "fetch it: git lfs pull"),
)


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """The UTF-8 bytes of a text file without its byte-order mark: gzip, zstd, xz, bz2 and UTF-16/32 are decoded.

    Raises BadRow for a file that is not text, and one of DAMAGE, here or while it is read, for a damaged one.
    """
    head, layers = _recognise(path)
    check_text(path, head)
    mark = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "")
    with ExitStack() as stack:
        stream = _open(path, layers, stack)
        if mark:
            stream = stack.enter_context(io.BufferedReader(_Blocks(_transcoded(stream, mark))))
        elif head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


def check_text(path: Path, head: bytes) -> None:
    """Raise BadRow when a file that begins with `head` is known not to be text that can be read."""
    # A text may begin with a magic of letters and digits ("ORCHESTRA"); the files have control characters after it.
    magic = (kind for kind in KINDS if head.startswith(kind.magic, kind.at))
    kind = next((kind for kind in magic if not kind.magic.isalnum() or head != head.translate(None, CONTROLS)), None)
    if kind:
        remedy = kind.remedy.format(file=shlex.quote(shown(path)))
        raise BadRow("not text", f"this is {kind.name}", where=shown(path), remedy=remedy)
    encoding = "" if head.startswith(tuple(mark for mark, _ in MARKS)) else _without_mark(head)
    if encoding:
        remedy = f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(shown(path))} > NEW"
        what = f"this is {encoding} without a byte-order mark, not UTF-8"
        raise BadRow("not UTF-8", what, where=shown(path), remedy=remedy)


def is_jsonl(path: Path, head: bytes) -> bool:
    """Whether a text that begins with `head` is JSON Lines: so named, or its first two lines are objects."""
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()][:2]
    named = any(suffix.lower() in (".jsonl", ".ndjson") for suffix in path.suffixes[-2:])
    return head.lstrip().startswith(b"{") and (named or (len(lines) == 2 and all(map(_is_object, lines))))


def damaged_file(path: Path, line: int, error: Exception) -> UserError:
    """The error for a file that cannot be read further than to its line `line`. error: one of DAMAGE."""
    why = f"what was read before has {line:,} whole lines" if line else ""
    remedy = "" if isinstance(error, OSError) and error.errno else "the file is damaged or cut off: copy it again"
    return UserError(f"cannot be read: {first_line(error)}", where=shown(path), why=why, remedy=remedy)


def is_binary(raw: bytes) -> bool:
    """Whether bytes have so many control characters that they are not text in any encoding of single bytes."""
    sample = raw[:HEAD_BYTES]
    return len(sample.translate(None, CONTROLS)) < 0.99 * len(sample)


def not_utf8(where: str, error: UnicodeDecodeError) -> BadRow:
    """The error for bytes that are not UTF-8."""
    what = f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {error.start}"
    if is_binary(error.object):
        return BadRow("not text", f"binary data, not text ({what})", where=where, remedy="exclude it from data.paths")
    remedy = "convert it from its encoding (windows-1252, gb18030, ...): iconv -f ENCODING -t UTF-8 FILE > NEW"
    return BadRow("not UTF-8", what, where=where, why="no byte of a text is replaced or skipped", remedy=remedy)


def shown(path: Path) -> str:
    """A path as text: bytes of a name that are not UTF-8 are written as escapes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _recognise(path: Path) -> tuple[bytes, list[Callable[[], Any]]]:
    """The first bytes of a file's content, and the decompressors that lead to it, the outermost first."""
    layers: list[Callable[[], Any]] = []
    while True:
        with ExitStack() as stack:
            head = _open(path, layers, stack).read(HEAD_BYTES)
        new = _decompressor(head)
        if new is None or len(layers) == LAYERS:
            return head, layers
        layers.append(new)


def _open(path: Path, layers: list[Callable[[], Any]], stack: ExitStack) -> io.BufferedReader:
    stream = stack.enter_context(path.open("rb"))
    for new in layers:
        stream = stack.enter_context(io.BufferedReader(_Blocks(_decompressed(stream, new)), TRANSCODED_BYTES))
    return stream


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    """What decompresses a stream that begins with `head`; its objects have decompress, eof and unused_data."""
    skippable = head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60  # pzstd writes such a frame first
    if head.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
    if head.startswith(b"\x1f\x8b\x08"):
        return lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    if head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return bz2.BZ2Decompressor
    return None


class _Blocks(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        count = min(len(into), len(self.rest))
        into[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def _decompressed(file: io.BufferedReader, new: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one or more members or frames, one after the other, perhaps with zeros between them.

    Nothing is left out silently: the libraries' own readers end without an error where a zstd frame is cut off, or
    where a second xz or bz2 stream is damaged.
    """
    frame = None
    while data := file.read(COMPRESSED_BYTES):
        while data := data if frame else data.lstrip(b"\x00"):
            frame = frame or new()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the compressed data ends too early")


def _transcoded(file: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := file.read(TRANSCODED_BYTES):
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


def _without_mark(head: bytes) -> str:
    """UTF-16 or UTF-32 where it is certain, else "": by the zeros of two ASCII characters at the start, or of most."""
    names = {"0111": "UTF-32LE", "1110": "UTF-32BE", "0101": "UTF-16LE", "1010": "UTF-16BE"}
    head = head[: len(head) // 4 * 4]
    most = "".join(str(int(head[i::4].count(0) * 8 > len(head))) for i in range(4))  # more than half of every fourth
    return names.get("".join(str(int(byte == 0)) for byte in head[:4])) or names.get(most, "")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
