"""TokenStore: a prepared corpus on disk, memory-mapped, and what each document in it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minka.data.indexed_dataset import Index, read_index, read_tokens
from minka.data.store_manifest import MANIFEST, SPLITS, Manifest, hash_file, read_manifest
from minka.data.tokenizer import TextTokenizer, read_tokenizer
from minka.plan.errors import UserError

SIDECAR_GROUP = 8_192  # rows in a row group of the sidecar: one group is read to look one document up


class Tokenized(NamedTuple):
    """One document of a split: its number, its tokens with the closing eod, bytes of its UTF-8 text, its source."""

    document: int
    tokens: NDArray[Any]
    bytes: int
    source: str


class TokenSpan(NamedTuple):
    """A part of a document: tokens first .. last-1 of the document numbered `document`."""

    document: int
    first: int
    last: int


@dataclass(frozen=True)
class Split:
    """One side of a store. tokens: [N], every document closed by `eod`, which occurs nowhere else."""

    folder: Path
    name: str
    tokens: NDArray[Any]
    index: Index
    eod: int
    tokenizer: TextTokenizer

    @property
    def n_tokens(self) -> int:
        """Tokens, end-of-document tokens included."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.index.lengths)

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """[documents] where each document begins, in tokens. 8 bytes a document of memory."""
        return np.asarray(self.index.pointers // self.tokens.itemsize)

    @cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """[documents] where each document ends (behind its eod), in tokens. 8 bytes a document of memory."""
        return self.document_starts + self.index.lengths

    @cached_property
    def document_bytes(self) -> NDArray[np.int64]:
        """[documents] UTF-8 bytes of each document's text."""
        return np.asarray(self._column("bytes").to_numpy())

    def document(self, i: int) -> NDArray[Any]:
        """Tokens of document i, its eod last."""
        start = int(self.index.pointers[self._known(i)]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.index.lengths[i])]

    def bytes_of(self, i: int) -> int:
        """UTF-8 bytes of document i's text (its eod has none)."""
        return int(self.document_bytes[self._known(i)])

    def source_of(self, i: int) -> str:
        """The source document i came from: what bits per byte are broken down by."""
        return str(self._sources[self._known(i)].as_py())

    def text_of(self, i: int) -> str:
        """Text of document i, decoded from its tokens: the original exactly where manifest.exact holds."""
        return self.tokenizer.decode(self.document(i))

    def provenance(self, i: int) -> dict[str, Any]:
        """Row i of the sidecar: id, source, path, url, licence, line, package, version, bytes, tokens, hash."""
        return self.provenances([i])[0]

    def provenances(self, documents: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of several documents, in the order asked for; each row group is read once."""
        found: dict[int, dict[str, Any]] = {}
        with pq.ParquetFile(self._sidecar) as table:
            for group, asked in groupby(sorted({self._known(i) for i in documents}), lambda i: i // SIDECAR_GROUP):
                numbers = list(asked)
                rows = table.read_row_group(group).take([i % SIDECAR_GROUP for i in numbers]).to_pylist()
                found |= zip(numbers, rows, strict=True)
        return [found[i] for i in documents]

    def documents(self, limit: int = 0) -> Iterator[Tokenized]:
        """Documents in order, at most `limit` of them (0 = all)."""
        for i in range(min(limit, self.n_documents) if limit else self.n_documents):
            yield Tokenized(i, self.document(i), self.bytes_of(i), self.source_of(i))

    def spans(self, first: int, last: int) -> list[TokenSpan]:
        """Which documents tokens first .. last-1 of the split belong to, in order."""
        spans, at = [], first
        while at < min(last, self.n_tokens):
            # searchsorted would copy the whole mapped index, which is not aligned; 30 look-ups will do.
            i = _rightmost(self.index.pointers, at * self.tokens.itemsize)
            start = int(self.index.pointers[i]) // self.tokens.itemsize
            end = min(last, start + int(self.index.lengths[i]))
            spans.append(TokenSpan(i, at - start, end - start))
            at = end
        return spans

    @property
    def _sidecar(self) -> Path:
        return self.folder / f"{self.name}.parquet"

    @cached_property
    def _sources(self) -> Any:
        return self._column("source").dictionary_encode().combine_chunks()

    def _column(self, name: str) -> Any:
        try:
            column = pq.read_table(self._sidecar, columns=[name])[name]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"the sidecar cannot be read: {error}", where=str(self._sidecar)) from None
        if len(column) != self.n_documents:
            raise UserError(
                f"the sidecar has {len(column)} rows for {self.n_documents} documents", where=str(self._sidecar)
            )
        return column

    def _known(self, i: int) -> int:
        if not 0 <= i < self.n_documents:
            raise UserError(
                f"there is no document {i}",
                where=f"{self.folder}, split {self.name}",
                remedy=f"documents are numbered 0 to {self.n_documents - 1}",
            )
        return i


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus: a folder of .bin, .idx and .parquet a split, tokenizer/ and manifest.json."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open a store. Sizes of files are checked (hashes by `minka data verify`). Raises UserError."""
        manifest = read_manifest(folder)
        for name, file in manifest.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != file.bytes:
                what = "is missing" if found is None else f"has {found} bytes where the manifest says {file.bytes}"
                raise UserError(
                    f"the store is damaged: {name} {what}",
                    where=str(folder),
                    remedy="copy it again from where it is whole, or remove it and run `minka data prepare` again",
                )
        missing = [name for name in SPLITS if name not in manifest.splits]
        if missing:
            raise UserError(f"the manifest has no split {missing[0]!r}", where=str(folder / MANIFEST))
        return cls(folder, manifest)

    @property
    def hash(self) -> str:
        """sha256 of manifest.json, which has the hash of everything else: the name of exactly this corpus."""
        return hash_file(self.folder / MANIFEST).sha256

    @property
    def eod(self) -> int:
        """Token id that ends every document."""
        return self.manifest.eod

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The store's tokenizer."""
        part = self.manifest.tokenizer
        return read_tokenizer(self.tokenizer_folder, part.kind, self.manifest.eod, part.entries)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that transformers.AutoTokenizer loads."""
        return self.folder / "tokenizer"

    def split(self, name: str) -> Split:
        """One side, "train" or "validation". Raises UserError when its files do not agree."""
        part = self.manifest.splits.get(name)
        if part is None:
            raise UserError(f"there is no split {name!r}", where=str(self.folder), remedy=f"it has {', '.join(SPLITS)}")
        index = read_index(self.folder / f"{name}.idx")
        tokens = read_tokens(self.folder / f"{name}.bin", index.dtype)
        if len(tokens) != part.tokens or len(index.lengths) != part.documents:
            raise UserError(
                f"{name} has {len(tokens)} tokens in {len(index.lengths)} documents where the manifest says "
                f"{part.tokens} in {part.documents}",
                where=str(self.folder),
                remedy="remove the folder and `minka data prepare` it again",
            )
        return Split(self.folder, name, tokens, index, self.manifest.eod, self.tokenizer)


def _rightmost(starts: NDArray[np.int64], at: int) -> int:
    """The last i with starts[i] <= at."""
    low, high = 0, len(starts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if starts[middle] <= at else (low, middle)
    return low
