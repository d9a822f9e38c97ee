"""From a sample of a run back to the documents it was cut from."""

from dataclasses import asdict, dataclass
from typing import Any

from minka.data.token_store import Split


@dataclass(frozen=True)
class DocumentSpan:
    """A part of a document inside a window: its tokens first .. last-1, and where the document came from."""

    document: int
    first: int
    last: int
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def trace_window(split: Split, window: int, seq_len: int) -> list[DocumentSpan]:
    """The documents whose tokens window `window` of seq_len tokens holds, in order, with their provenance."""
    spans = split.spans(window * seq_len, (window + 1) * seq_len)
    rows = split.provenances([span.document for span in spans])
    return [DocumentSpan(*span, provenance=row) for span, row in zip(spans, rows, strict=True)]
