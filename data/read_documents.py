"""Read the documents of a corpus: the table of input formats, the limit data.max_bytes, and the hash of each text."""

from collections.abc import Callable, Iterator

from minka.data.document import Document, HashedDocument, content_hash
from minka.data.row_sources import hub_documents, jsonl_documents, parquet_documents
from minka.data.text_sources import stdlib_documents, text_documents
from minka.plan.config_sections import DataSection
from minka.plan.errors import UserError


def read_documents(data: DataSection) -> Iterator[HashedDocument]:
    """Every document in a fixed order, empty ones too, until data.max_bytes is reached. Raises UserError."""
    sources: dict[str, Callable[[DataSection], Iterator[Document]]] = {
        "stdlib": stdlib_documents,
        "text": text_documents,
        "jsonl": jsonl_documents,
        "parquet": parquet_documents,
        "datasets": hub_documents,
    }
    total = 0
    for document in sources[data.source](data):
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start} of the text is half of a surrogate pair",
                where=document.id,
                why="it has no UTF-8 encoding, so the text cannot be kept exactly",
                remedy="correct the escape (\\ud8xx without its partner) in the source",
            ) from None
        total += len(raw)
        if data.max_bytes and total > data.max_bytes:
            return
        yield HashedDocument(document, raw, content_hash(raw))
