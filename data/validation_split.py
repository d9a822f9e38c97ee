"""The train/validation split: by content hash, with a cutoff that a first reading of the corpus decides."""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from minka.data.document import HASH_BYTES, BadRow, Document
from minka.data.read_documents import read_documents
from minka.data.split_text import HOW_TO_SPLIT
from minka.data.store_manifest import SkippedRows
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

HASH_SPACE = 2**64  # documents are split by the first 8 bytes of their hash
SHOWN_BAD_ROWS, SHOWN_OF_A_REASON = 20, 5
SAMPLE_BYTES = 256 * 2**20  # a tokenizer is trained on at most this much text


@dataclass(frozen=True)
class CorpusSurvey:
    """Result of the first reading. size: UTF-8 bytes; empty: documents without text; skipped: None without bad rows."""

    size: int
    empty: int
    skipped: SkippedRows | None
    checksum: int
    cutoff: int  # a document is in the validation split when its split_key is below
    moved: str  # "" or why the cutoff is not data.validation_fraction's
    sample: tuple[bytes, ...]  # training texts for a tokenizer


def survey_corpus(data: DataSection, advance: Callable[[int], None]) -> CorpusSurvey:
    """Read the corpus once. Memory: at most SAMPLE_BYTES of text, and that only when a tokenizer is to be trained.

    advance: called with the bytes of each document. Raises UserError when there is nothing to split.
    """
    documents = size = empty = checksum = 0
    lowest, highest = HASH_SPACE, -1
    sample = _TextSample(SAMPLE_BYTES if data.tokenizer == "bpe" else 0)
    bad: Counter[str] = Counter()
    first: list[str] = []

    def skip(row: BadRow) -> None:
        bad[row.reason] += 1
        if len(first) < SHOWN_BAD_ROWS and bad[row.reason] <= SHOWN_OF_A_REASON:
            first.append(f"{row.where}: {row.what}")

    for document in read_documents(data, skip):
        if not document.raw:
            empty += 1
            continue
        documents, size = documents + 1, size + len(document.raw)
        checksum = add_hash(checksum, document.hash)
        lowest, highest = min(lowest, document.split_key), max(highest, document.split_key)
        sample.add(document)
        advance(len(document.raw))
    skipped = SkippedRows(rows=bad.total(), reasons=dict(bad.most_common()), first=tuple(first)) if bad else None
    if not documents:
        why = f"all {empty} documents are empty" if empty else "no document was found"
        if skipped:
            why = f"{skipped.describe(empty)}; the first: {first[0]}"
        remedy = "give files that contain text, or use data.source=stdlib, which is on every machine"
        if data.max_bytes:
            why = f"no whole document fits in data.max_bytes={data.max_bytes}"
            remedy = "raise data.max_bytes, or set it to 0 for no limit"
        where = f"data.source={data.source}" + (f", data.paths={list(data.paths)}" if data.paths else "")
        raise UserError("the corpus has no text", where=where, why=why, remedy=remedy)
    cutoff, moved = _cutoff(data, lowest, highest, documents)
    return CorpusSurvey(size, empty, skipped, checksum, cutoff, moved, sample.training_texts(cutoff))


def add_hash(checksum: int, content: bytes) -> int:
    """Add a document to the checksum of a corpus, which does not depend on their order."""
    return (checksum + int.from_bytes(content, "big")) % 2 ** (8 * HASH_BYTES)


class _TextSample:
    """The texts with the smallest hashes that fit in `limit` bytes: a uniform sample that does not depend on order.

    Ranked by the second half of the hash, because the first half decides the split.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.bound = HASH_SPACE  # the smallest rank that did not fit: none above it may enter later
        self.heap: list[tuple[int, int, int, bytes]] = []  # (-rank, -arrival, split key, text): largest rank first
        self.arrived = 0

    def add(self, document: Document) -> None:
        rank = int.from_bytes(document.hash[8:], "big")
        if not self.limit or rank >= self.bound:
            return
        self.arrived += 1
        heapq.heappush(self.heap, (-rank, -self.arrived, document.split_key, document.raw))
        self.size += len(document.raw)
        while self.size > self.limit and len(self.heap) > 1:
            worst, _, _, raw = heapq.heappop(self.heap)
            self.size, self.bound = self.size - len(raw), -worst

    def training_texts(self, cutoff: int) -> tuple[bytes, ...]:
        in_order = sorted(self.heap, key=lambda entry: -entry[1])
        return tuple(raw for _, _, key, raw in in_order if key >= cutoff)


def _cutoff(data: DataSection, lowest: int, highest: int, documents: int) -> tuple[int, str]:
    """(cutoff, why it was moved). Neither split may be empty: the lowest hash always validates, the highest trains."""
    if lowest == highest:
        raise UserError(
            f"all {documents} documents are the same text" if documents > 1 else "the corpus is a single document",
            where=f"data.source={data.source}",
            remedy=HOW_TO_SPLIT if data.source == "text" else "give two or more, one of them for validation",
        )
    wanted = int(data.validation_fraction * HASH_SPACE)
    asked = f"data.validation_fraction={data.validation_fraction} of {documents} documents"
    if wanted <= lowest:
        return lowest + 1, f"{asked} is none; the one with the lowest content hash was taken"
    if wanted > highest:
        return highest, f"{asked} is all; the one with the highest content hash was left to training"
    return wanted, ""
