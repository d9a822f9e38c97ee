"""Document: one text, where it came from, and the hash of its content. BadRow: a row that cannot be one."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from minka.plan.errors import UserError

HASH_BYTES = 16


class BadRow(UserError):
    """A row of a corpus, or a file that is to be one document, that cannot be used. `reason`: one of a few, counted."""

    def __init__(self, reason: str, what: str = "", *, where: str, why: str = "", remedy: str = "") -> None:
        super().__init__(what or reason, where=where, why=why, remedy=remedy)
        self.reason = reason


@dataclass(frozen=True)
class Document:
    """One text and its provenance. `line` counts from 1 (of a text or JSONL file; row of a table); 0 = a whole file."""

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
        """The text in UTF-8. Raises BadRow when it has no such encoding."""
        return encode(self.text, "the text", self.id)

    @cached_property
    def hash(self) -> bytes:
        return content_hash(self.raw)

    @property
    def split_key(self) -> int:
        """The hash's first 8 bytes as a number; the document is for validation when it is below the cutoff."""
        return int.from_bytes(self.hash[:8], "big")


def encode(text: str, what: str, where: str) -> bytes:
    """UTF-8 of `what` in the row `where`. Raises BadRow for half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{what} has half of a surrogate pair",
            f"character {error.start} of {what} is half of a surrogate pair, which has no UTF-8 encoding",
            where=where,
            remedy="correct the escape (\\ud8xx without its partner) in the source",
        ) from None


def content_hash(raw: bytes) -> bytes:
    """blake2b-128 of a text's UTF-8 bytes."""
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).digest()
