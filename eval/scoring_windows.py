"""Documents cut into windows and packed into rows. Each token of a document but its first is a target exactly once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minka.data.batch import IGNORED


class ScoringWindow(NamedTuple):
    """A part of one document. Targets before index `scored` are context only."""

    document: int
    tokens: np.ndarray  # one longer than the inputs: input i predicts token i + 1
    scored: int


class ScoringBatch(NamedTuple):
    """Rows filled with windows of one or more documents; all tensors [B, T] int64."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    owners: Tensor  # index of the document that each target belongs to, or -1


def scoring_windows(document: int, tokens: np.ndarray, length: int, stride: int) -> Iterator[ScoringWindow]:
    """Yield windows of at most `length` inputs, `stride` apart. Each target is scored in the first window that has it.

    With stride < length every target, except those of the first window, has at least length - stride tokens of context.
    """
    first, done = 0, 1  # tokens[:done] are scored; the first token has no context and is charged elsewhere
    while done < len(tokens):
        last = min(first + length, len(tokens) - 1)
        yield ScoringWindow(document, tokens[first : last + 1], done - first - 1)
        done = last + 1
        first += stride


def pack_windows(windows: Iterable[ScoringWindow], length: int, batch: int, padding: int) -> Iterator[ScoringBatch]:
    """Pack windows into rows of `length` (next fit), and rows into batches of exactly `batch` rows.

    The rest of a row is filled with the token `padding`, and is document number 0.
    """
    out, row, at = padding_batch(length, batch, padding), 0, 0
    for window in windows:
        end = at + len(window.tokens) - 1
        if end > length:
            row, at, end = row + 1, 0, end - at
        if row == batch:
            yield out
            out, row = padding_batch(length, batch, padding), 0
        tokens = torch.from_numpy(window.tokens.astype(np.int64))
        out.tokens[row, at:end] = tokens[:-1]
        out.targets[row, at + window.scored : end] = tokens[window.scored + 1 :]
        out.owners[row, at + window.scored : end] = window.document
        out.documents[row, at:end] = out.documents[row].max() + 1
        out.positions[row, at:end] = torch.arange(end - at)
        out.positions[row, end:] = torch.arange(length - end)
        at = end
    if at:
        yield out


def padding_batch(length: int, batch: int, padding: int) -> ScoringBatch:
    """Return a batch without targets, for ranks that have no windows left: a forward pass is collective."""
    shape = (batch, length)
    return ScoringBatch(
        tokens=torch.full(shape, padding),
        targets=torch.full(shape, IGNORED),
        documents=torch.zeros(shape, dtype=torch.int64),
        positions=torch.arange(length).repeat(batch, 1),
        owners=torch.full(shape, -1),
    )
