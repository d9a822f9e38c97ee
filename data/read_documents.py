"""Read the documents of a corpus: the table of input formats, bad rows, and the limit data.max_bytes."""

from collections.abc import Callable, Iterator

from minka.data.document import BadRow, Document
from minka.data.row_sources import hub_documents, jsonl_documents, parquet_documents
from minka.data.text_sources import stdlib_documents, text_documents
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError


def read_documents(data: DataSection, skip: Callable[[BadRow], None] = lambda _: None) -> Iterator[Document]:
    """Every document in a fixed order, empty ones too, until data.max_bytes is reached.

    Raises UserError for a bad row, or calls `skip` with it where data.bad_rows="skip".
    """
    sources = {
        "stdlib": stdlib_documents,
        "text": text_documents,
        "jsonl": jsonl_documents,
        "parquet": parquet_documents,
        "datasets": hub_documents,
    }
    total = 0
    for row in sources[data.source](data):
        if isinstance(row, BadRow):
            if data.bad_rows == "refuse":
                remedy = f"{row.remedy}; or leave out what cannot be used, counted and listed, with data.bad_rows=skip"
                raise UserError(row.what, where=row.where, why=row.why, remedy=remedy)
            skip(row)
            continue
        total += len(row.raw)
        if data.max_bytes and total > data.max_bytes:
            return
        yield row
