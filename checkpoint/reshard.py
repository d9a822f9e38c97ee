"""Fill this rank's pieces from shard files of any layout: find the overlapping boxes, read them, copy them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minka.checkpoint.index import Index, PieceGroup
from minka.checkpoint.manifest import Damage
from minka.checkpoint.shard_file import ShardReader, TensorSpan
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.pieces import Piece, tensor_name

BLOCK_BYTES = 32 * 2**20  # read at once: the memory that a restore needs in addition to the pieces it fills


class PlannedRead(NamedTuple):
    """The box of a stored piece that begins at `start` and goes into `target`, a view of a local tensor."""

    span: TensorSpan
    start: tuple[int, ...]
    target: Tensor


def fill(checkpoint: StoredCheckpoint, tensors: Mapping[str, Piece]) -> None:
    """Copy what the checkpoint has of `tensors` into them. Raises OSError and Damage; some are then filled.

    Each file is read from front to back, and only the chunks that hold something wanted.
    """
    missing = {key: piece.local.numel() for key, piece in tensors.items()}
    for rank, keys in needed_ranks(checkpoint.index, tensors).items():
        reader = ShardReader(checkpoint, rank)
        stored: dict[str, list[tuple[PieceGroup, TensorSpan]]] = defaultdict(list)
        for group in reader.table.groups:
            for key in group.keys:
                stored[tensor_name(key)].append((group, reader.span_of(key, group)))
        reads = []
        for key in keys:
            found = list(_overlaps(stored[tensor_name(key)], tensors[key]))
            missing[key] -= sum(read.target.numel() for read in found)
            reads += found
        with torch.no_grad():
            for read in sorted(reads, key=lambda read: read.span.first):
                _copy(reader, read)
    for key, numbers in missing.items():
        if numbers:
            had = f"{tensors[key].local.numel() - numbers:,} of {tensors[key].local.numel():,}"
            raise Damage(f"{checkpoint.path}: {tensor_name(key)} has {had} numbers of this rank's box")


def needed_ranks(index: Index, tensors: Mapping[str, Piece]) -> dict[int, list[str]]:
    """The ranks that have written parts of these pieces, each with the keys of those pieces."""
    needed: dict[int, list[str]] = defaultdict(list)
    for key, piece in tensors.items():
        for rank in index.ranks_with(tensor_name(key), piece.offset, piece.local.shape):
            needed[rank].append(key)
    return needed


def _overlaps(stored: list[tuple[PieceGroup, TensorSpan]], piece: Piece) -> Iterator[PlannedRead]:
    """What these boxes of one tensor have of a local piece."""
    for box, span in stored:
        starts = [max(*both) for both in zip(box.offset, piece.offset, strict=True)]
        stored_ends = (first + size for first, size in zip(box.offset, box.size, strict=True))
        local_ends = (first + size for first, size in zip(piece.offset, piece.local.shape, strict=True))
        ends = [min(*both) for both in zip(stored_ends, local_ends, strict=True)]
        if all(start < end for start, end in zip(starts, ends, strict=True)):
            target = piece.local
            for dim, (start, end) in enumerate(zip(starts, ends, strict=True)):
                target = target.narrow(dim, start - piece.offset[dim], end - start)
            yield PlannedRead(span, tuple(a - b for a, b in zip(starts, box.offset, strict=True)), target)


def _copy(reader: ShardReader, read: PlannedRead) -> None:
    """By blocks of rows; a row that is only partly wanted is read whole. A scalar is one row of one number."""
    target, start = (read.target, read.start) if read.start else (read.target.unsqueeze(0), (0,))
    row_bytes = math.prod(read.span.shape[1:]) * target.element_size()
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for done in range(0, target.shape[0], rows):
        count = min(rows, target.shape[0] - done)
        block = reader.rows(read.span, start[0] + done, start[0] + done + count)
        for dim in range(1, len(start)):
            block = block.narrow(dim, start[dim], target.shape[dim])
        target.narrow(0, done, count).copy_(block)
