"""SplitWriter: write the .bin, .idx and .parquet files of one split, document by document, in bounded memory."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from minka.data.document import Document
from minka.data.indexed_dataset import HEADER, LONGEST, finish_index
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
            self._index = stack.enter_context((self.folder / f"{self.name}.idx").open("wb"))
            self._index.write(bytes(HEADER.size))
            self._sidecar = stack.enter_context(pa.OSFile(str(self.folder / f"{self.name}.parquet"), "wb"))
            self._table = pq.ParquetWriter(self._sidecar, SIDECAR, compression="zstd")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close what `finish` did not, after an error. A full disk fails again here, which must not hide that error."""
        with suppress(pa.ArrowException, OSError):
            self._table.close()  # else it tries when it is collected, and complains on stderr
        with suppress(OSError):
            self._open.close()

    def add(self, document: Document, tokens: NDArray[Any]) -> None:
        """Append a document with its tokens (without eod, which is added here)."""
        if bool((tokens == self.eod).any()):
            raise UserError(
                f"the tokenizer made its end-of-document token (id {self.eod}) from text",
                where=document.id,
                why="it would cut the document in two",
                remedy="use a tokenizer whose end-of-text token is a special token, bpe or bytes",
            )
        length = len(tokens) + 1
        if length > LONGEST:
            raise UserError(f"the document has {length} tokens; at most {LONGEST} are allowed", where=document.id)
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._bin.write(self.dtype.type(self.eod).tobytes())
        self._index.write(length.to_bytes(4, "little"))
        row = {name: getattr(document, name) for name in PROVENANCE}
        self._rows.append({**row, "bytes": len(document.raw), "tokens": length, "hash": document.hash.hex()})
        self.documents += 1
        self.tokens += length
        self.bytes += len(document.raw)
        if len(self._rows) == SIDECAR_GROUP:
            self._write_rows()

    def finish(self) -> SplitTotals:
        """Write the remaining rows and the index, and close the files."""
        if self._rows:
            self._write_rows()
        self._table.close()
        finish_index(self._index, self.dtype)
        self._open.close()
        return SplitTotals(documents=self.documents, tokens=self.tokens, bytes=self.bytes)

    def _write_rows(self) -> None:
        self._table.write_table(pa.Table.from_pylist(self._rows, schema=SIDECAR), row_group_size=SIDECAR_GROUP)
        self._rows = []
