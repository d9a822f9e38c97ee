"""SplitWriter: write the .bin, .idx and .parquet files of one split, document by document, in bounded memory."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minka.data.document import HashedDocument
from minka.data.indexed_dataset import LONGEST, write_index
from minka.data.store_manifest import SplitTotals
from minka.data.token_store import SIDECAR_GROUP
from minka.plan.errors import UserError

PROVENANCE = ("id", "source", "path", "url", "licence", "line", "package", "version")
SIDECAR = pa.schema(
    [(name, pa.int64() if name == "line" else pa.string()) for name in PROVENANCE]
    + [("bytes", pa.int64()), ("tokens", pa.int64()), ("hash", pa.string())]
)


class SplitWriter:
    """Writes NAME.bin, NAME.idx and NAME.parquet in `folder`. Use it in a `with` and call `finish`. Raises OSError."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], eod: int) -> None:
        self.folder, self.name, self.dtype, self.eod = folder, name, dtype, eod
        self.documents = self.tokens = self.bytes = 0
        self._rows: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._bin = stack.enter_context((self.folder / f"{self.name}.bin").open("wb"))
            self._lengths = stack.enter_context(self._lengths_file.open("wb"))
            self._sidecar = stack.enter_context(pa.OSFile(str(self.folder / f"{self.name}.parquet"), "wb"))
            self._table = pq.ParquetWriter(self._sidecar, SIDECAR, compression="zstd")
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._open.close()
            return
        with suppress(pa.ArrowException, OSError):
            self._table.close()  # else it tries when it is collected, and complains on stderr
        with suppress(OSError):  # a full disk fails again as the buffers are flushed
            self._open.close()

    def add(self, documents: Sequence[tuple[HashedDocument, NDArray[Any]]]) -> None:
        """Append documents, each with its tokens (without eod, which is added here)."""
        lengths = []
        for hashed, tokens in documents:
            self._check(hashed, tokens)
            self._bin.write(tokens.astype(self.dtype).tobytes())
            self._bin.write(self.dtype.type(self.eod).tobytes())
            lengths.append(len(tokens) + 1)
            self._count(hashed, len(tokens) + 1)
        self._lengths.write(np.array(lengths, dtype="<i4").tobytes())

    def finish(self) -> SplitTotals:
        """Write the remaining rows and the index, and close the files."""
        if self._rows:
            self._flush()
        self._table.close()
        self._open.close()
        write_index(self.folder / f"{self.name}.idx", self._lengths_file, self.dtype)
        self._lengths_file.unlink()
        return SplitTotals(documents=self.documents, tokens=self.tokens, bytes=self.bytes)

    @property
    def _lengths_file(self) -> Path:
        return self.folder / f"{self.name}.lengths"

    def _check(self, hashed: HashedDocument, tokens: NDArray[Any]) -> None:
        if bool((tokens == self.eod).any()):
            raise UserError(
                f"the tokenizer made its end-of-document token (id {self.eod}) from text",
                where=hashed.document.id,
                why="it would cut the document in two",
                remedy="use a tokenizer whose end-of-text token is a special token, bpe or bytes",
            )
        if len(tokens) >= LONGEST:
            raise UserError(
                f"the document has {len(tokens)} tokens; at most {LONGEST - 1} are allowed", where=hashed.document.id
            )

    def _count(self, hashed: HashedDocument, tokens: int) -> None:
        row: dict[str, object] = {name: getattr(hashed.document, name) for name in PROVENANCE}
        self._rows.append({**row, "bytes": len(hashed.raw), "tokens": tokens, "hash": hashed.hash.hex()})
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + tokens, self.bytes + len(hashed.raw)
        if len(self._rows) == SIDECAR_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._table.write_table(pa.Table.from_pylist(self._rows, schema=SIDECAR), row_group_size=SIDECAR_GROUP)
        self._rows = []
