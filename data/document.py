"""Document: one text and where it came from; HashedDocument: the same as UTF-8, with the hash of its content."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its provenance. `line` counts from 1 (line of a JSONL file, row of a table); 0 = the whole file."""

    text: str
    id: str
    source: str
    path: str
    url: str = ""
    licence: str = ""
    line: int = 0
    package: str = ""
    version: str = ""


class HashedDocument(NamedTuple):
    """A document, its text in UTF-8, and the hash of that. The first 8 bytes of the hash decide the split."""

    document: Document
    raw: bytes
    hash: bytes

    @property
    def split_key(self) -> int:
        """0 <= key < 2**64; the document is in the validation split when it is below the cutoff."""
        return int.from_bytes(self.hash[:8], "big")


def content_hash(raw: bytes) -> bytes:
    """blake2b-128 of a text's UTF-8 bytes."""
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).digest()
