"""Document: one text, where it came from, and the hash of its content."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from minka.plan.errors import UserError

HASH_BYTES = 16


@dataclass(frozen=True)
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

    @cached_property
    def raw(self) -> bytes:
        """The text in UTF-8. Raises UserError when it has no such encoding."""
        try:
            return self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start} of the text is half of a surrogate pair, which has no UTF-8 encoding",
                where=self.id,
                remedy="correct the escape (\\ud8xx without its partner) in the source",
            ) from None

    @cached_property
    def hash(self) -> bytes:
        return content_hash(self.raw)

    @property
    def split_key(self) -> int:
        """The hash's first 8 bytes as a number; the document is for validation when it is below the cutoff."""
        return int.from_bytes(self.hash[:8], "big")


def content_hash(raw: bytes) -> bytes:
    """blake2b-128 of a text's UTF-8 bytes."""
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).digest()
