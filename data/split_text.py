"""Cut a stream of text into documents: at a separator, and into chunks of a size. Memory: one document."""

from collections.abc import Iterator
from typing import IO, NamedTuple

from minka.plan.errors import UserError

BLOCK_BYTES = 2**20
LARGEST_DOCUMENT = 2**30  # bytes: a document, its tokens and their offsets are in memory together
HOW_TO_SPLIT = (
    "files are cut into documents at a separator, 'data.split_on=\"\\n\\n\"' or 'data.split_on=\"<|endoftext|>\"' (the "
    "outer quotes are for the shell), or by size, data.chunk_bytes=65536"
)


class TextPiece(NamedTuple):
    """One document of a text: the bytes before it in the text, the line (from 1) on which it begins, its bytes."""

    offset: int
    line: int
    raw: bytes
    separated: bool  # a separator is after it


def split_text(stream: IO[bytes], separator: bytes, chunk: int, where: str) -> Iterator[TextPiece]:
    """The pieces of UTF-8 text, in order; a text without content is one empty piece.

    Newlines directly around a separator belong to it. chunk: at most so many bytes in a piece, 0 = any number; such
    cuts lose nothing. Where they are follows from the bytes alone. Raises UserError for a piece that is too large.
    """
    buffer, offset, line = bytearray(), 0, 1
    searched, after, more, empty = 0, False, True, True
    while more or buffer or empty:
        found = buffer.find(separator, searched) if separator else -1
        searched = found if found >= 0 else max(searched, len(buffer) - len(separator) + 1)
        reach = found if found >= 0 else len(buffer) - (len(separator) if more else 0)
        end, skip = (_cut(buffer, chunk), 0) if chunk and reach > chunk else (found, len(separator))
        if end < 0 and more:
            block = stream.read(BLOCK_BYTES)
            more = bool(block)
            buffer += block
            if len(buffer) > LARGEST_DOCUMENT + len(separator):
                what = f"a document of more than {LARGEST_DOCUMENT / 2**30:g} GiB begins on this line"
                raise UserError(what, where=f"{where}:{line}", remedy=HOW_TO_SPLIT)
            continue
        end, skip = (len(buffer), 0) if end < 0 else (end, skip)
        raw = bytes(buffer[:end])
        lead = len(raw) - len(raw.lstrip(b"\r\n")) if after else 0
        kept = raw[lead:].rstrip(b"\r\n") if skip else raw[lead:]
        yield TextPiece(offset + lead, line + raw.count(b"\n", 0, lead), kept, skip > 0)
        line, offset = line + raw.count(b"\n") + separator.count(b"\n") * (skip > 0), offset + end + skip
        searched, after, empty = max(0, searched - end - skip), skip > 0, False
        del buffer[: end + skip]


def _cut(text: bytearray, limit: int) -> int:
    """The end of a chunk of at most `limit` bytes: after a line, else a space, of its second half, else a character."""
    for mark in (b"\n", b" "):
        if at := text.rfind(mark, limit // 2, limit) + 1:
            return at
    return next((at for at in range(limit, limit - 4, -1) if text[at] & 0xC0 != 0x80), limit)
