"""Documents cut into rows a model can score: every token but a document's first is a target exactly once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minka.model.transformer import IGNORED


class Window(NamedTuple):
    """Inputs tokens[first : first + len] of one document; targets before `scored` only give context."""

    document: int
    tokens: np.ndarray  # one longer than the inputs: input i predicts token i + 1
    scored: int


@dataclass(frozen=True)
class ScoringBatch:
    """A batch of rows, each filled with windows of one or more documents; all [B, T] int64.

    `owners` says whose target each place is: an index into the documents, or -1.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    owners: Tensor


def windows(document: int, tokens: np.ndarray, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` inputs, `stride` apart: each target is scored in the first window that has it.

    With stride < length every target but the first ones has at least length - stride tokens of context.
    """
    first, done = 0, 1  # tokens[:done] are scored; the first has no context and is charged for elsewhere
    while done < len(tokens):
        last = min(first + length, len(tokens) - 1)
        yield Window(document, tokens[first : last + 1], done - first - 1)
        done = last + 1
        first += stride


def rows(cut: Iterable[Window], length: int, batch: int, fill: int) -> Iterator[ScoringBatch]:
    """Pack windows into rows of `length` (next fit) and rows into batches of exactly `batch` rows."""
    waiting: list[list[Window]] = []
    row: list[Window] = []
    room = length
    for window in cut:
        inputs = len(window.tokens) - 1
        if inputs > room:
            waiting.append(row)
            row, room = [], length
            if len(waiting) == batch:
                yield _batch(waiting, length, batch, fill)
                waiting = []
        row.append(window)
        room -= inputs
    waiting += [row] if row else []
    if waiting:
        yield _batch(waiting, length, batch, fill)


def filler(length: int, batch: int, fill: int) -> ScoringBatch:
    """A batch without targets, for ranks that have run out: a forward pass is collective."""
    return _batch([], length, batch, fill)


def _batch(filled: Sequence[Sequence[Window]], length: int, batch: int, fill: int) -> ScoringBatch:
    tokens = np.full((batch, length), fill, dtype=np.int64)
    targets = np.full((batch, length), IGNORED, dtype=np.int64)
    owners = np.full((batch, length), -1, dtype=np.int64)
    documents = np.zeros((batch, length), dtype=np.int64)
    positions = np.tile(np.arange(length), (batch, 1))
    for r, row in enumerate(filled):
        at = 0
        for number, window in enumerate(row, start=1):
            n = len(window.tokens) - 1
            tokens[r, at : at + n] = window.tokens[:-1]
            targets[r, at + window.scored : at + n] = window.tokens[window.scored + 1 :]
            owners[r, at + window.scored : at + n] = window.document
            documents[r, at : at + n] = number
            positions[r, at : at + n] = np.arange(n)
            at += n
        positions[r, at:] = np.arange(length - at)  # the rest of the row is padding, document 0
    return ScoringBatch(*(torch.from_numpy(a) for a in (tokens, targets, documents, positions, owners)))
