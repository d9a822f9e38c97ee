"""The corpus as a stream of hashed documents, and the survey that decides which side of the split each is on."""

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minka.data.documents import Document, stdlib_documents, text_documents
from minka.data.row_sources import hub_documents, jsonl_documents, parquet_documents
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

HASH_BYTES = 16
HASH_SPACE = 2**64  # documents are split by the first 8 bytes of their hash
SAMPLE_BYTES = 256 * 2**20  # a tokenizer is trained on at most so much text


class Item(NamedTuple):
    """A document, its text in UTF-8, and blake2b-128 of that."""

    document: Document
    raw: bytes
    hash: bytes

    @property
    def key(self) -> int:
        """Where the document stands between the two sides: validation is key < cutoff."""
        return int.from_bytes(self.hash[:8], "big")


@dataclass(frozen=True)
class Survey:
    """What one reading of the corpus tells: size (UTF-8 bytes), a checksum of its content, cutoff of the split."""

    documents: int
    size: int
    empty: int
    checksum: int
    cutoff: int
    moved: str  # "" or why the cutoff is not data.validation_fraction's
    sample: tuple[bytes, ...]  # training texts for a tokenizer


def read_corpus(data: DataSection) -> Iterator[Item]:
    """Every document in its one order, empty ones too, until data.max_bytes is reached. Raises UserError."""
    total = 0
    for document in _documents(data):
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start} of the text is half of a surrogate pair",
                where=document.id,
                why="no UTF-8 exists for it, so the text cannot be kept exactly",
                remedy="mend the escape (\\ud8xx without its partner) in the source",
            ) from None
        total += len(raw)
        if data.max_bytes and total > data.max_bytes:
            return
        yield Item(document, raw, content_hash(raw))


def content_hash(raw: bytes) -> bytes:
    """blake2b-128 of a text's UTF-8 bytes."""
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).digest()


def survey(data: DataSection, advance: Callable[[int], None]) -> Survey:
    """Read the corpus once. Memory: at most SAMPLE_BYTES of text, and that only when a tokenizer is to be trained.

    advance: called with the bytes of each document. Raises UserError when there is nothing to split.
    """
    documents = size = empty = checksum = 0
    lowest, highest = HASH_SPACE, -1
    sample = _Sample(SAMPLE_BYTES if data.tokenizer == "bpe" else 0)
    for item in read_corpus(data):
        if not item.raw:
            empty += 1
            continue
        documents, size = documents + 1, size + len(item.raw)
        checksum = add_hash(checksum, item.hash)
        lowest, highest = min(lowest, item.key), max(highest, item.key)
        sample.add(item)
        advance(len(item.raw))
    if not documents:
        raise _no_text(data, empty)
    cutoff, moved = _cutoff(data, lowest, highest, documents)
    return Survey(documents, size, empty, checksum, cutoff, moved, sample.texts(cutoff))


def add_hash(checksum: int, content: bytes) -> int:
    """A checksum of a multiset of documents: two readings of one corpus must agree on it."""
    return (checksum + int.from_bytes(content, "big")) & ((1 << 8 * HASH_BYTES) - 1)


class _Sample:
    """As many documents of the smallest hashes as fit in `limit` bytes: a uniform sample, whatever their order.

    Ranked by the second half of the hash, since the first half decides the split.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.bound = HASH_SPACE  # the smallest rank that did not fit: none above it may come in later
        self.heap: list[tuple[int, int, int, bytes]] = []  # (-rank, -arrival, key, text): the largest rank leaves first
        self.arrived = 0

    def add(self, item: Item) -> None:
        rank = int.from_bytes(item.hash[8:], "big")
        if not self.limit or rank >= self.bound:
            return
        self.arrived += 1
        heapq.heappush(self.heap, (-rank, -self.arrived, item.key, item.raw))
        self.size += len(item.raw)
        while self.size > self.limit and len(self.heap) > 1:
            worst, _, _, raw = heapq.heappop(self.heap)
            self.size, self.bound = self.size - len(raw), -worst

    def texts(self, cutoff: int) -> tuple[bytes, ...]:
        kept = sorted(self.heap, key=lambda entry: -entry[1])
        return tuple(raw for _, _, key, raw in kept if key >= cutoff)


def _documents(data: DataSection) -> Iterator[Document]:
    match data.source:
        case "stdlib":
            return stdlib_documents()
        case "text":
            return text_documents(data)
        case "jsonl":
            return jsonl_documents(data)
        case "parquet":
            return parquet_documents(data)
        case "datasets":
            return hub_documents(data)


def _cutoff(data: DataSection, lowest: int, highest: int, documents: int) -> tuple[int, str]:
    """Neither side may be empty: the document of the lowest hash always validates, that of the highest trains."""
    if lowest == highest:
        raise UserError(
            f"all {documents} documents are the same text" if documents > 1 else "the corpus is one single document",
            where=f"data.source={data.source}",
            why="documents are split into train and validation by their content, and neither side may be empty",
            remedy="give at least two different documents (a text file is one, and so is a line of JSONL)",
        )
    wanted = int(data.validation_fraction * HASH_SPACE)
    if wanted <= lowest:
        return lowest + 1, (
            f"data.validation_fraction={data.validation_fraction} of {documents} documents is none; "
            "the one with the lowest content hash was taken"
        )
    if wanted > highest:
        return highest, (
            f"data.validation_fraction={data.validation_fraction} of {documents} documents is all; "
            "the one with the highest content hash was left to training"
        )
    return wanted, ""


def _no_text(data: DataSection, empty: int) -> UserError:
    where = f"data.source={data.source}" + (f", data.paths={list(data.paths)}" if data.paths else "")
    if data.max_bytes:
        return UserError(
            "no text was read",
            where=where,
            why=f"no whole document fits in data.max_bytes={data.max_bytes}",
            remedy="raise data.max_bytes, or set it to 0 for no limit",
        )
    return UserError(
        "the corpus has no text",
        where=where,
        why=f"{empty} documents were found, all empty" if empty else "no document was found",
        remedy="give files with text in them, or data.source=stdlib, which is on every machine",
    )
