"""TokenStore: a prepared corpus on disk, memory-mapped. Split: its tokens, documents, provenance and windows."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minka.data.indexed_dataset import DatasetIndex, read_index, read_tokens
from minka.data.store_manifest import SPLITS, Manifest, read_manifest
from minka.data.tokenizer import TextTokenizer, read_tokenizer
from minka.plan.errors import UserError
from minka.plan.read_file import reading
from minka.plan.store_files import MANIFEST, REPAIR, check_store_files, damaged_store, sha256_of

LOST, LOST_DTYPE = ".lost", "<i8"  # ending and type of the file of Split.lost_bytes
SIDECAR_GROUP = 8_192  # rows in a row group of the sidecar: a look-up of one document reads one group


@dataclass(frozen=True)
class Split:
    """One split of a store. tokens: [n_tokens], every document ends with `eod`, which occurs nowhere else."""

    folder: Path
    name: str
    tokens: NDArray[Any]
    index: DatasetIndex
    eod: int
    tokenizer: TextTokenizer
    exact: bool = True

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.index.lengths)

    @cached_property
    def document_bytes(self) -> NDArray[np.int64]:
        """[documents] UTF-8 bytes of each document's text."""
        return np.asarray(self._column("bytes").to_numpy())

    @cached_property
    def lost_bytes(self) -> NDArray[np.float64]:
        """[documents] UTF-8 bytes of each document that its tokens do not give back; NaN where nobody measured it."""
        file = self.folder / f"{self.name}{LOST}"
        if not file.exists():
            return np.full(self.n_documents, 0.0 if self.exact else np.nan)
        with reading(file, "numbers of bytes", ValueError):
            lost = np.fromfile(file, dtype=LOST_DTYPE)
        if len(lost) != self.n_documents:
            raise UserError(f"it has {len(lost)} entries for {self.n_documents} documents", where=str(file))
        return lost.astype(np.float64)

    def read_sidecar(self) -> None:
        """Read all that scoring needs of the sidecar, so that nothing can be missing afterwards. Raises UserError."""
        _ = self.document_bytes, self.lost_bytes, self._sources

    def document(self, i: int) -> NDArray[Any]:
        """Tokens of document i, its eod last."""
        start, length = int(self.index.pointers[self._known(i)]) // self.tokens.itemsize, int(self.index.lengths[i])
        if not 0 <= start < start + length <= self.n_tokens:  # no token is read: others may ask for it
            what = f"document {i} is not where {self.name}.idx says: tokens {start} to {start + length}"
            raise damaged_store(self.folder, what)
        return self.tokens[start : start + length]

    def source_of(self, i: int) -> str:
        """The source of document i. Evaluation reports bits per byte for each source."""
        return str(self._sources[self._known(i)].as_py())

    def text_of(self, i: int) -> str:
        """Text of document i, decoded from its tokens. It is exactly the original when manifest.exact is true."""
        return self.tokenizer.decode(self.document(i))

    def provenance(self, i: int) -> dict[str, Any]:
        """Row i of the sidecar: id, source, path, url, licence, line, package, version, bytes, tokens, hash."""
        return self.provenances([i])[0]

    def provenances(self, documents: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of several documents, in the order asked for; each row group is read once."""
        found: dict[int, dict[str, Any]] = {}
        with (
            reading(self._sidecar, "a sidecar", pa.ArrowException, remedy=REPAIR),
            pq.ParquetFile(self._sidecar) as table,
        ):
            for group, asked in groupby(sorted({self._known(i) for i in documents}), lambda i: i // SIDECAR_GROUP):
                numbers = list(asked)
                rows = table.read_row_group(group).take([i % SIDECAR_GROUP for i in numbers]).to_pylist()
                found |= zip(numbers, rows, strict=True)
        return [found[i] for i in documents]

    def trace_window(self, window: int, seq_len: int) -> list[dict[str, Any]]:
        """The documents of window `window` (of seq_len tokens), in order.

        Each is its number (document), the tokens of it that are in the window (first .. last-1), and its provenance.
        """
        at, end = window * seq_len, min((window + 1) * seq_len, self.n_tokens)
        spans = []
        while at < end:
            # Not np.searchsorted: the mapped index is not aligned, so it would copy all of it.
            i = bisect_right(self.index.pointers, at * self.tokens.itemsize) - 1
            start = int(self.index.pointers[i]) // self.tokens.itemsize
            last = min(end - start, len(self.document(i)))
            if i < 0 or start + last <= at:  # else this never ends
                raise damaged_store(self.folder, f"token {at} is in no document of {self.name}.idx")
            spans.append({"document": i, "first": at - start, "last": last})
            at = start + last
        rows = self.provenances([span["document"] for span in spans])
        return [{**span, "provenance": row} for span, row in zip(spans, rows, strict=True)]

    @property
    def _sidecar(self) -> Path:
        return self.folder / f"{self.name}.parquet"

    @cached_property
    def _sources(self) -> Any:
        return self._column("source").dictionary_encode().combine_chunks()

    def _column(self, name: str) -> Any:
        with reading(self._sidecar, "a sidecar", pa.ArrowException, remedy=REPAIR):
            column = pq.read_table(self._sidecar, columns=[name])[name]
        if len(column) != self.n_documents:
            what = f"the sidecar has {len(column)} rows for {self.n_documents} documents"
            raise UserError(what, where=str(self._sidecar))
        return column

    def _known(self, i: int) -> int:
        if not 0 <= i < self.n_documents:
            remedy = f"documents are numbered 0 to {self.n_documents - 1}"
            raise UserError(f"there is no document {i}", where=f"{self.folder}, split {self.name}", remedy=remedy)
        return i


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus: a folder with .bin, .idx and .parquet of each split, tokenizer/ and manifest.json."""

    folder: Path
    manifest: Manifest
    hash: str  # sha256 of manifest.json, which contains the hash of every other file: it identifies the exact corpus

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open a store: check the sizes of its files, and hash its tokenizer's. Raises UserError.

        data/verify.py hashes the others: those of validation before it is scored, and all in `minka data verify`.
        """
        manifest, problems = read_manifest(folder), []
        for name, file in manifest.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != file.bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes where the manifest says {file.bytes}")
        if problems:
            raise damaged_store(folder, *problems)
        check_store_files(folder, "tokenizer/")
        return cls(folder, manifest, sha256_of(folder / MANIFEST))

    @property
    def eod(self) -> int:
        return self.manifest.eod

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        part = self.manifest.tokenizer
        return read_tokenizer(self.tokenizer_folder, part.kind, self.manifest.eod, part.entries)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that transformers.AutoTokenizer loads."""
        return self.folder / "tokenizer"

    def split(self, name: str) -> Split:
        """The split "train" or "validation". Raises UserError when its files do not agree."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}", where=str(self.folder), remedy=f"it has {', '.join(SPLITS)}")
        totals = self.manifest.splits[name]
        index = read_index(self.folder / f"{name}.idx")
        tokens = read_tokens(self.folder / f"{name}.bin", index.dtype)
        if len(tokens) != totals.tokens or len(index.lengths) != totals.documents:
            found = f"{len(tokens)} tokens in {len(index.lengths)} documents"
            expected = f"{totals.tokens} in {totals.documents}"
            raise damaged_store(self.folder, f"{name} has {found} where the manifest says {expected}")
        return Split(self.folder, name, tokens, index, self.manifest.eod, self.tokenizer, self.manifest.exact)
