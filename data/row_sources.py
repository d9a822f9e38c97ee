"""Sources whose documents are rows: JSONL (plain, gzip, zstd), Parquet, and what `datasets.load_dataset` opens."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from minka.data.document import Document
from minka.data.text_sources import expand_paths, not_utf8
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.read_file import first_line, reading

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
# Columns in which public corpora keep provenance: the fields of Document, and one in American spelling.
PROVENANCE_COLUMNS = ("id", "source", "url", "licence", "license", "package", "version")
PARQUET_BATCH_ROWS = 256  # documents may be megabytes each


def jsonl_documents(data: DataSection) -> Iterator[Document]:
    """A document for each line of the files of data.paths. Raises UserError with file:line."""
    for path in expand_paths(data.paths, JSONL):
        with reading(path, "JSONL", EOFError, zlib.error, zstandard.ZstdError), _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = _parse(line, f"{path}:{number}")
                    yield document_of_row(row, data.text_field, "jsonl", path.as_posix(), number)


def parquet_documents(data: DataSection) -> Iterator[Document]:
    """A document for each row of the files of data.paths. Raises UserError that lists the file's columns."""
    for path in expand_paths(data.paths, (".parquet",)):
        try:
            yield from _parquet_file(path, data.text_field)
        except UnicodeDecodeError as error:
            raise not_utf8(str(path), error) from None


def hub_documents(data: DataSection) -> Iterator[Document]:
    """A document for each row of a dataset, streamed: a hub name, a builder with data.paths, or a saved folder."""
    name = " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_split)))
    number = 0
    try:
        for number, row in enumerate(_open_dataset(data), 1):
            yield document_of_row(row, data.text_field, data.dataset, data.dataset, number)
    except UserError:
        raise
    except Exception as error:  # its readers, the network and the hub raise errors without a common base
        raise UserError(
            f"datasets could not read it{f' at row {number + 1}' if number else ''}: {first_line(error)}",
            where=f"data.dataset: {name}",
            remedy="check data.dataset, data.dataset_config, data.dataset_split and data.paths (its data_files)",
        ) from None


def document_of_row(row: object, field: str, source: str, path: str, number: int) -> Document:
    """The row's text and provenance. Raises UserError when the text is missing or not a string."""
    where = f"{path}:{number}"
    if not isinstance(row, Mapping):
        what = f"the row is not an object but {type(row).__name__}"
        raise UserError(what, where=where, remedy=f'write {{"{field}": "..."}}')
    text = row.get(field)
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        what = f"{field!r} is {kind}, not text" if field in row else f"the row has no {field!r}"
        texts = [str(name) for name, value in row.items() if isinstance(value, str)]
        remedy = f"set data.text_field to a field with text: {', '.join(texts)}" if texts else "remove the row"
        raise UserError(what, where=where, remedy=remedy)
    provenance: dict[str, str] = {}
    for name in PROVENANCE_COLUMNS:
        value = row.get(name)
        if name != field and isinstance(value, str | int) and str(value):
            provenance.setdefault("licence" if name == "license" else name, str(value))
    return Document(**{"id": where, "source": source, **provenance}, text=text, path=path, line=number)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        # A file may be many frames (written by several processes, or by `cat`).
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True))
    return path.open("rb")


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))  # some editors put a byte-order mark first
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        remedy = 'write each document as one complete JSON object, {"text": "..."}, on its own line'
        raise UserError(f"not a JSON line: {error}", where=where, remedy=remedy) from None


def _parquet_file(path: Path, field: str) -> Iterator[Document]:
    with reading(path, "Parquet", pa.ArrowException), pq.ParquetFile(path) as table:
        schema = table.schema_arrow
        if field not in schema.names:
            remedy = f"set data.text_field to one of its columns: {', '.join(schema.names)}"
            raise UserError(f"there is no column {field!r}", where=str(path), remedy=remedy)
        columns = [field] + [name for name in PROVENANCE_COLUMNS if name in schema.names and name != field]
        batches = table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield document_of_row(row, field, "parquet", path.as_posix(), number)


def _open_dataset(data: DataSection) -> Iterator[Any]:
    import datasets  # takes a second to import, and only this source needs it

    if (Path(data.dataset) / "state.json").is_file() or (Path(data.dataset) / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(data.dataset)
        return iter(saved[data.dataset_split] if isinstance(saved, dict) else saved)
    opened = datasets.load_dataset(
        data.dataset,
        data.dataset_config or None,
        data_files=list(data.paths) or None,
        split=data.dataset_split,
        streaming=True,
    )
    return iter(opened)
