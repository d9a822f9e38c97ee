"""Read the documents of a corpus: the table of input formats, and the limit data.max_bytes."""

from collections.abc import Iterator

from minka.data.document import Document
from minka.data.row_sources import hub_documents, jsonl_documents, parquet_documents
from minka.data.text_sources import stdlib_documents, text_documents
from minka.plan.config_sections import DataSection


def read_documents(data: DataSection) -> Iterator[Document]:
    """Every document in a fixed order, empty ones too, until data.max_bytes is reached. Raises UserError."""
    sources = {
        "stdlib": stdlib_documents,
        "text": text_documents,
        "jsonl": jsonl_documents,
        "parquet": parquet_documents,
        "datasets": hub_documents,
    }
    total = 0
    for document in sources[data.source](data):
        total += len(document.raw)
        if data.max_bytes and total > data.max_bytes:
            return
        yield document
