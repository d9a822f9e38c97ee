"""Sources whose documents are rows: JSONL, Parquet, and what `datasets.load_dataset` opens."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minka.data.corpus_files import find_files
from minka.data.document import BadRow, Document
from minka.data.row_document import PROVENANCE_COLUMNS, RowReader
from minka.data.split_text import LARGEST_DOCUMENT
from minka.data.text_file import DAMAGE, HEAD_BYTES, check_text, damaged_file, is_binary, not_utf8, open_text, shown
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError
from minka.plan.read_file import first_line, reading

PARQUET_BATCH_ROWS = 256  # documents may be megabytes each
ONE_LINE = 'write each document as one complete JSON object, {"text": "..."}, on its own line'


def jsonl_documents(data: DataSection) -> Iterator[Document | BadRow]:
    """A document or bad row for each line of the files of data.paths that is not empty. Raises UserError."""
    reader = RowReader(data, "jsonl")
    for path in find_files(data).files:
        name, number = shown(path), 0
        try:
            with open_text(path) as lines:
                for number, line in enumerate(iter(lambda: lines.readline(LARGEST_DOCUMENT + 1), b""), 1):
                    if line.strip():
                        row = _parse(line, path, name, number)
                        yield row if isinstance(row, BadRow) else reader.document(row, name, number)
        except DAMAGE as error:
            raise damaged_file(path, number, error) from None


def parquet_documents(data: DataSection) -> Iterator[Document | BadRow]:
    """A document or bad row for each row of the files of data.paths. Memory: one row group. Raises UserError."""
    reader = RowReader(data, "parquet")
    for path in find_files(data).files:
        name, damaged = shown(path), "the file is damaged or cut off: copy it again"
        with reading(path):
            _check_parquet(path)
        with reading(path, "Parquet", pa.ArrowException, remedy=damaged), pq.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=_columns(table, reader, name))
            for number, row in enumerate((row for batch in batches for row in _rows(batch)), 1):
                if isinstance(row, UnicodeDecodeError):
                    yield not_utf8(f"{name}:{number}", row)
                else:
                    yield reader.document(row, name, number)


def hub_documents(data: DataSection) -> Iterator[Document | BadRow]:
    """A document or bad row for each row of a dataset, streamed: a hub name, a builder with data.paths, or a folder."""
    name = " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_split)))
    reader, number = RowReader(data, data.dataset), 0
    try:
        for number, row in enumerate(_open_dataset(data), 1):
            yield reader.document(row, data.dataset, number)
    except Exception as error:  # its readers, the network and the hub raise errors without a common base
        raise UserError(
            f"datasets could not read it{f' at row {number + 1}' if number else ''}: {first_line(error)}",
            where=f"data.dataset: {name}",
            why="without a network, data.dataset is a folder made by datasets.load_dataset(...).save_to_disk(FOLDER)",
            remedy="check data.dataset, data.dataset_config, data.dataset_split and data.paths (its data_files)",
        ) from None


def _parse(line: bytes, path: Path, name: str, number: int) -> object:
    """The JSON value of a line, or a BadRow. Raises UserError when the whole file cannot be JSON Lines."""
    where = f"{name}:{number}"
    if len(line) > LARGEST_DOCUMENT:
        raise UserError(f"this line has more than {LARGEST_DOCUMENT / 2**30:g} GiB", where=where, remedy=ONE_LINE)
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())  # joined files may have a mark inside
    except UnicodeDecodeError as error:
        return not_utf8(where, error)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        if is_binary(line):
            return BadRow("not text", "binary data, not JSON", where=where, remedy="exclude the file from data.paths")
        if number == 1:
            _check_first_line(line.strip(), path)
        return BadRow("not JSON", f"not a JSON line: {first_line(error)}", where=where, remedy=ONE_LINE)
    if number == 1 and isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
        raise _json_document(path, ".[]")
    return row


def _check_first_line(line: bytes, path: Path) -> None:
    """Raise UserError where a line that is not JSON is the first one of a different kind of file."""
    where, remedy = shown(path), ""
    if line[:1] in (b"[", b"{") and line[-1:] in (b"[", b"{", b","):
        raise _json_document(path, ".[]" if line[:1] == b"[" else ".")
    if line[:1] == b"<":
        raise UserError("this is HTML or XML, not JSON Lines", where=where, remedy="give the data itself")
    if b"{" not in line and b"," in line:
        remedy = f"read it with {_with_datasets(path, 'csv')} and name its column with data.text_field"
    elif b"{" not in line and b"\t" in line:
        remedy = f"convert it: mlr --itsv --ojsonl cat {shlex.quote(where)} > NEW.jsonl"
    if remedy:
        raise UserError("this looks like CSV or TSV, not JSON Lines", where=where, remedy=remedy)


def _json_document(path: Path, select: str) -> UserError:
    convert = f"convert it: jq -c '{select}' {shlex.quote(shown(path))} > NEW.jsonl"
    remedy = f"{convert}; or read it with {_with_datasets(path, 'json')}"
    return UserError("this is one JSON document, not JSON Lines", where=shown(path), remedy=remedy)


def _with_datasets(path: Path, builder: str) -> str:
    return f"data.source=datasets data.dataset={builder} 'data.paths=[\"{shown(path)}\"]'"


def _check_parquet(path: Path) -> None:
    """Raise UserError that says what a file is when it is not Parquet."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return
    if not head:
        raise UserError("the file is empty, not Parquet", where=shown(path), remedy="copy it again, or exclude it")
    check_text(path, head)
    try:
        with open_text(path) as stream:
            json_like = stream.read(HEAD_BYTES).lstrip()[:1] in (b"{", b"[")
        kind, remedy = ("JSON", "data.source=jsonl") if json_like else ("text", "data.source=text")
        remedy = f"it is read with {remedy}"
    except BadRow as bad:
        kind, remedy = f"a compressed file ({bad.what})", "decompress it first"
    except DAMAGE as error:
        raise damaged_file(path, 0, error) from None
    raise UserError(f"this is not Parquet but {kind}", where=shown(path), remedy=remedy)


def _columns(table: pq.ParquetFile, reader: RowReader, name: str) -> list[str]:
    """The columns, or leaves of columns of structs, that are read. Raises UserError for a column that is missing."""
    names = table.schema_arrow.names
    leaves = {leaf.path: leaf.physical_type for leaf in map(table.schema.column, range(len(table.schema)))}
    wanted = [column for columns in PROVENANCE_COLUMNS.values() for column in columns if column in names]
    for setting, field in reader.fields().items():
        column = field if field in names else re.split(r"[.\[]", field)[0]
        if column not in names:
            texts = [re.sub(r"\.list\.\w+", "[]", path) for path, kind in leaves.items() if kind == "BYTE_ARRAY"]
            remedy = f"set data.{setting} to one of its columns: {', '.join(texts or names)}"
            raise UserError(f"there is no column {column!r} (data.{setting})", where=name, remedy=remedy)
        wanted.append(field if field in leaves else column)
    return wanted


def _rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """Each row as a dict, or the UnicodeDecodeError of its bytes."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error
        else:
            for i in range(batch.num_rows):
                yield from _rows(batch.slice(i, 1))
    else:
        yield from rows


def _open_dataset(data: DataSection) -> Iterator[Any]:
    import datasets  # takes a second to import, and only this source needs it
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # each try of a request that fails is a warning; the last one's error is reported
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
