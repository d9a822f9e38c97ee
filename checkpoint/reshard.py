"""Fill this rank's pieces from shard files of any layout: find the overlapping boxes, read them, copy them."""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from minka.checkpoint.index import Index, PieceGroup
from minka.checkpoint.manifest import Damage
from minka.checkpoint.shard_file import ShardReader, TensorSpan
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.pieces import Piece, Pieces
from minka.plan.tensor_name import tensor_name

BLOCK_BYTES = 32 * 2**20  # read at once: the memory that a restore needs in addition to the pieces it fills


def fill(checkpoint: StoredCheckpoint, tensors: Pieces) -> None:
    """Copy what the checkpoint has of `tensors` into them. Raises OSError and Damage; some are then filled."""
    missing = {key: piece.local.numel() for key, piece in tensors.items()}
    for rank, keys in needed_ranks(checkpoint.index, tensors).items():
        reader = ShardReader(checkpoint, rank)
        stored: dict[str, list[tuple[PieceGroup, TensorSpan]]] = defaultdict(list)
        for group in reader.table.groups:
            for key in group.keys:
                stored[tensor_name(key)].append((group, reader.span_of(key, group)))
        reads = []
        for key in keys:
            for span, start, target in _overlaps(stored[tensor_name(key)], tensors[key]):
                missing[key] -= target.numel()
                reads.append((span, start, target))
        with torch.no_grad():
            for span, start, target in sorted(reads, key=lambda read: read[0].first):  # each chunk once
                _copy(reader, span, start, target)
    for key, numbers in missing.items():
        if numbers:
            had = f"{tensors[key].local.numel() - numbers:,} of {tensors[key].local.numel():,}"
            raise Damage(f"{checkpoint.path}: {tensor_name(key)} has {had} numbers of this rank's box")


def needed_ranks(index: Index, tensors: Pieces) -> dict[int, list[str]]:
    """The ranks that have written parts of these pieces, each with the keys of those pieces."""
    needed: dict[int, list[str]] = defaultdict(list)
    for key, piece in tensors.items():
        for rank in index.ranks_with(tensor_name(key), piece.offset, piece.local.shape):
            needed[rank].append(key)
    return needed


def _overlaps(
    stored: list[tuple[PieceGroup, TensorSpan]], piece: Piece
) -> Iterator[tuple[TensorSpan, list[int], Tensor]]:
    """What these boxes of one tensor have of a local piece: span, where to start in it, and the view that it fills."""
    for box, span in stored:
        start: list[int] = []
        target = piece.local
        sides = zip(box.offset, box.size, piece.offset, piece.local.shape, strict=True)
        for dim, (stored_first, stored_size, first, size) in enumerate(sides):
            begin, end = max(stored_first, first), min(stored_first + stored_size, first + size)
            if begin >= end:
                break
            start.append(begin - stored_first)
            target = target.narrow(dim, begin - first, end - begin)
        else:
            yield span, start, target


def _copy(reader: ShardReader, span: TensorSpan, start: list[int], target: Tensor) -> None:
    """By blocks of rows; a row that is only partly wanted is read whole. A scalar is one row of one number."""
    if not start:
        start, target = [0], target.unsqueeze(0)
    row_bytes = math.prod(span.shape[1:]) * target.element_size()
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for done in range(0, target.shape[0], rows):
        count = min(rows, target.shape[0] - done)
        block = reader.rows(span, start[0] + done, start[0] + done + count)
        for dim in range(1, len(start)):
            block = block.narrow(dim, start[dim], target.shape[dim])
        target.narrow(0, done, count).copy_(block)
