"""Which keys a query sees, as intervals: causal within each document, and across no border between documents.

Nq queries · Nk keys, of all documents one after the other
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Query i sees the keys [first_key[i], end_key[i]); key j is seen by the queries [first_query[j], end_query[j]).

    Two descriptions of one relation, int32 [Nq] and [Nk], on the device: forward needs the first, backward both.
    """

    first_key: Tensor
    end_key: Tensor
    first_query: Tensor
    end_query: Tensor


def document_spans(q_starts: Tensor, k_starts: Tensor, queries: int, keys: int) -> Spans:
    """The spans of documents whose cumulative lengths are q_starts and k_starts, int32 [documents + 1].

    Aligned bottom-right: the last query of a document sees all of its keys, the one before one fewer. Empty documents
    at the end are padding. The host waits for nothing.
    """
    q_starts, k_starts = q_starts.long(), k_starts.long()
    at = torch.arange(queries, device=q_starts.device)
    document = torch.searchsorted(q_starts[1:], at, right=True)
    first_key = k_starts[document]
    end_key = k_starts[document + 1] - (q_starts[document + 1] - 1 - at)
    at = torch.arange(keys, device=q_starts.device)
    document = torch.searchsorted(k_starts[1:], at, right=True)
    end_query = q_starts[document + 1]
    first_query = torch.maximum(q_starts[document], at - k_starts[document + 1] + end_query)
    return Spans(*(x.to(torch.int32) for x in (first_key, end_key, first_query, end_query)))


def causal_spans(rows: int, length: int, device: torch.device) -> Spans:
    """The spans of `rows` documents of `length` tokens each."""
    at = torch.arange(rows * length, dtype=torch.int32, device=device)
    first = at // length * length
    return Spans(first, at + 1, at, first + length)
