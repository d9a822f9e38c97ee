"""Documents from tables of rows: JSONL (plain, gzip, zstd), Parquet, and what `datasets.load_dataset` opens."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from minka.data.documents import Document, expand, not_utf8
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
# Names under which public corpora keep a row's provenance -> Document's field.
KNOWN_FIELDS = (
    ("id", "id"),
    ("source", "source"),
    ("url", "url"),
    ("licence", "licence"),
    ("license", "licence"),
    ("package", "package"),
    ("version", "version"),
)
ROWS_AT_ONCE = 256  # of a Parquet file; its documents may be megabytes each


def jsonl_documents(data: DataSection) -> Iterator[Document]:
    """A document for each line of the files that data.paths means. Raises UserError with file:line."""
    for path in expand(data.paths, JSONL):
        for number, line in _lines(path):
            row = _parse(line, f"{path}:{number}")
            yield document_of_row(row, data.text_field, "jsonl", path.as_posix(), number)


def parquet_documents(data: DataSection) -> Iterator[Document]:
    """A document for each row of the files that data.paths means. Raises UserError with the file's columns."""
    for path in expand(data.paths, (".parquet",)):
        try:
            yield from _parquet_file(path, data.text_field)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"cannot be read as Parquet: {_first_line(error)}", where=str(path)) from None
        except UnicodeDecodeError as error:
            raise not_utf8(str(path), error.start, error.object[error.start]) from None


def hub_documents(data: DataSection) -> Iterator[Document]:
    """A document for each row of a dataset, streamed: a hub name, a builder with data.paths, or a saved folder."""
    name = " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_split)))
    number = 0
    try:
        for number, row in enumerate(_open_dataset(data), 1):
            yield document_of_row(row, data.text_field, data.dataset, data.dataset, number)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises what its readers, the network and the hub raise; no common base
        raise UserError(
            f"datasets could not read it{f' at row {number + 1}' if number else ''}: {_first_line(error)}",
            where=f"data.dataset: {name}",
            remedy="check data.dataset, data.dataset_config, data.dataset_split and data.paths (its data_files)",
        ) from None


def document_of_row(row: object, field: str, source: str, path: str, number: int) -> Document:
    """The row's text and what provenance it names itself. Raises UserError when the text is missing or no string."""
    where = f"{path}:{number}"
    if not isinstance(row, Mapping):
        raise UserError(
            f"the row is no object but {type(row).__name__}", where=where, remedy=f'write {{"{field}": "..."}}'
        )
    text = row.get(field)
    if not isinstance(text, str):
        what = f"{field!r} is {_kind(text)}, no text" if field in row else f"the row has no {field!r}"
        raise UserError(what, where=where, remedy=f"set data.text_field to one of the row's fields: {', '.join(row)}")
    known: dict[str, str] = {}
    for name, ours in KNOWN_FIELDS:
        value = row.get(name)
        if name != field and isinstance(value, str | int) and str(value):
            known.setdefault(ours, str(value))
    return Document(**{"id": where, "source": source, **known}, text=text, path=path, line=number)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"cannot be read: {_first_line(error)}", where=str(path)) from None


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
        raise not_utf8(where, error.start, line[error.start]) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"this line is no JSON: {error}",
            where=where,
            why="a JSONL file holds one whole JSON object a line",
            remedy='write each document as {"text": "..."} on its own line',
        ) from None


def _parquet_file(path: Path, field: str) -> Iterator[Document]:
    with pq.ParquetFile(path) as table:
        schema = table.schema_arrow
        if field not in schema.names:
            raise UserError(
                f"there is no column {field!r}",
                where=str(path),
                remedy=f"set data.text_field to one of its columns: {', '.join(schema.names)}",
            )
        columns = [field] + [name for name, _ in KNOWN_FIELDS if name in schema.names and name != field]
        number = 0
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield document_of_row(row, field, "parquet", path.as_posix(), number)


def _open_dataset(data: DataSection) -> Iterator[Any]:
    import datasets  # a second to import, and only this source needs it

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


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
