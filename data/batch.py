"""Batch: dense tensors of shape [B, T] on the host, and how windows of a token stream become one.

B sequences · T tokens in a sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # a target that counts for nothing
PADDING = -1  # sample id of a padding sequence, which only makes the batch divisible


@dataclass(frozen=True)
class Batch:
    """Sequences of one rank, on the host. int64 tensors: tokens, targets, documents, positions [B, T]; samples [B].

    targets: the next token of the same document, or IGNORED. documents: differ between the documents of a row, from 0.
    positions: restart at each document and at the row's start. samples: position in the run's order, or PADDING.
    target_count: targets that count.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    samples: Tensor
    target_count: int

    def micro_batches(self, size: int) -> list["Batch"]:
        """The batch in parts of `size` sequences, in order. `size` must divide B."""
        rows = len(self.samples)
        if rows % size:
            raise ValueError(f"{rows} sequences cannot be cut into micro-batches of {size}")
        return [self.take(slice(start, start + size)) for start in range(0, rows, size)]

    def take(self, rows: slice | Tensor) -> "Batch":
        """The batch of some of its sequences."""
        tensors = (self.tokens, self.targets, self.documents, self.positions, self.samples)
        tokens, targets, documents, positions, samples = (tensor[rows] for tensor in tensors)
        return Batch(tokens, targets, documents, positions, samples, int((targets != IGNORED).sum()))

    def largest_token(self) -> int:
        """The largest id among tokens and targets."""
        return max(int(self.tokens.max()), int(self.targets.max()))


def build_batch(
    stream: NDArray[Any], windows: Sequence[int] | NDArray[np.int64], samples: NDArray[np.int64], seq_len: int, eod: int
) -> Batch:
    """Windows of a token stream as a Batch.

    stream: all tokens of a split, each document ended by `eod`, which occurs nowhere else. windows: [B], window k
    begins at token k*seq_len; PADDING makes an empty sequence. samples: [B], their ids. Beyond the stream's end, rows
    are padded.
    """
    block = np.full((len(windows), seq_len + 1), eod, dtype=stream.dtype)  # targets of eod are ignored
    real = np.zeros(len(windows), dtype=np.int64)  # how many of the first T tokens of each row are not padding
    for row, window in enumerate(windows):
        start = int(window) * seq_len
        part = stream[start : start + seq_len + 1] if window != PADDING else stream[:0]
        block[row, : len(part)] = part
        real[row] = len(part)
    ends = block[:, :-1] == eod
    tokens = block[:, :-1].astype(np.int64)
    targets = block[:, 1:].astype(np.int64)
    np.putmask(targets, ends, IGNORED)  # the next token is of a different document, or padding
    count = ends.size - int(np.count_nonzero(ends))
    for short in np.flatnonzero(real < seq_len):
        ends[short, real[short] :] = False  # padding is one document, not one a token
    documents, positions = _structure(ends)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(documents),
        torch.from_numpy(positions),
        torch.from_numpy(np.asarray(samples, dtype=np.int64)),
        count,
    )


def _structure(ends: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document ids and positions [B, T], from which tokens end a document.

    Run lengths and np.repeat: twice as fast here as cumulative sums and maxima.
    """
    rows, length = ends.shape
    begins = np.empty_like(ends)
    begins[:, 0] = True
    begins[:, 1:] = ends[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=rows * length)
    in_row = np.count_nonzero(begins, axis=1)
    ids = np.arange(len(starts)) - np.repeat(np.cumsum(in_row) - in_row, in_row)
    documents = np.repeat(ids, lengths).reshape(rows, length)
    positions = (np.arange(rows * length) - np.repeat(starts, lengths)).reshape(rows, length)
    return documents, positions
