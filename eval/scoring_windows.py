"""Documents cut into windows and packed into rows that a model can score.

Every token of a document but its first is a target exactly once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minka.model.transformer import IGNORED


class ScoringWindow(NamedTuple):
    """A part of one document. Targets before index `scored` are context only."""

    document: int
    tokens: np.ndarray  # one longer than the inputs: input i predicts token i + 1
    scored: int


class ScoringBatch(NamedTuple):
    """Rows filled with windows of one or more documents; all tensors [B, T] int64.

    `owners` is the index of the document that each target belongs to, or -1.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    owners: Tensor


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

    The rest of a row is filled with the token `padding`.
    """
    rows: list[list[ScoringWindow]] = [[]]
    room = length
    for window in windows:
        inputs = len(window.tokens) - 1
        if inputs > room:
            if len(rows) == batch:
                yield _build_batch(rows, length, batch, padding)
                rows = []
            rows.append([])
            room = length
        rows[-1].append(window)
        room -= inputs
    if rows[-1]:
        yield _build_batch(rows, length, batch, padding)


def padding_batch(length: int, batch: int, padding: int) -> ScoringBatch:
    """Return a batch without targets, for ranks that have no windows left: a forward pass is collective."""
    return _build_batch([], length, batch, padding)


def _build_batch(rows: Sequence[Sequence[ScoringWindow]], length: int, batch: int, padding: int) -> ScoringBatch:
    tokens = np.full((batch, length), padding, dtype=np.int64)
    targets = np.full((batch, length), IGNORED, dtype=np.int64)
    owners = np.full((batch, length), -1, dtype=np.int64)
    documents = np.zeros((batch, length), dtype=np.int64)
    positions = np.tile(np.arange(length), (batch, 1))
    for r, row in enumerate(rows):
        at = 0
        for number, window in enumerate(row, start=1):
            n = len(window.tokens) - 1
            tokens[r, at : at + n] = window.tokens[:-1]
            targets[r, at + window.scored : at + n] = window.tokens[window.scored + 1 :]
            owners[r, at + window.scored : at + n] = window.document
            documents[r, at : at + n] = number
            positions[r, at : at + n] = np.arange(n)
            at += n
        positions[r, at:] = np.arange(length - at)  # the rest of the row is a document of padding, number 0
    return ScoringBatch(*(torch.from_numpy(a) for a in (tokens, targets, documents, positions, owners)))
