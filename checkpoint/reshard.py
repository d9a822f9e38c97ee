"""Fill this rank's pieces from shard files of any layout: find the overlapping boxes, read them, copy them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minka.checkpoint.index import DTYPE_BYTES, StoredPiece
from minka.checkpoint.manifest import Damage
from minka.checkpoint.shard_file import ShardReader
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.pieces import Piece, tensor_name

BLOCK_BYTES = 32 * 2**20  # read at once: the memory that a restore needs in addition to the pieces it fills


class PlannedRead(NamedTuple):
    """A box of a stored piece that goes into a box of a local tensor. A scalar is one row of one number."""

    key: str  # of the stored piece in its file
    target: Tensor
    start: tuple[int, ...]  # of the box in the stored piece
    stored: tuple[int, ...]  # shape of the stored piece


def fill(checkpoint: StoredCheckpoint, tensors: Mapping[str, Piece], alive: Callable[[], None]) -> None:
    """Copy what the checkpoint has of `tensors` into them. Raises OSError and Damage; some are then filled.

    Each file is read from front to back, and only the chunks that hold something wanted.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    missing = {key: piece.local.numel() for key, piece in tensors.items()}
    for key, piece in tensors.items():
        for file in checkpoint.index.files_with(tensor_name(key), piece.offset, piece.local.shape):
            wanted[file].append(key)
    for file, keys in wanted.items():
        table = checkpoint.table(file)
        stored: dict[str, dict[str, StoredPiece]] = defaultdict(dict)
        for stored_key, box in table.pieces.items():
            stored[tensor_name(stored_key)][stored_key] = box
        reads = []
        for key in keys:
            for read in _overlaps(checkpoint, stored[tensor_name(key)], tensors[key]):
                missing[key] -= read.target.numel()
                reads.append(read)
        if any(numbers < 0 for numbers in missing.values()):
            break
        reader = ShardReader(checkpoint.fs, checkpoint.path / file, table, checkpoint.header.chunk_bytes, alive)
        for read in reads:
            _check_span(reader, read, checkpoint.index.tensors[tensor_name(read.key)].dtype)
        with torch.no_grad():
            for read in sorted(reads, key=lambda read: reader.spans[read.key].first):
                _copy(reader, read)
    for key, numbers in missing.items():
        if numbers:
            wrong = f"{numbers:,} numbers of this rank's box are missing" if numbers > 0 else "it has boxes that overlap"
            raise Damage(f"{checkpoint.path}: {tensor_name(key)}: {wrong}")


def _overlaps(checkpoint: StoredCheckpoint, stored: Mapping[str, StoredPiece], piece: Piece) -> Iterator[PlannedRead]:
    """What these boxes of one tensor have of a local piece."""
    for key, box in stored.items():
        name = tensor_name(key)
        described = (checkpoint.index.tensors[name].dtype, checkpoint.index.shape(name))
        if (box.dtype, box.shape) != described or not len(box.offset) == len(box.size) == len(box.shape):
            raise Damage(f"{checkpoint.path}: the table has a different {key} than the index")
        target, start = piece.local, []
        for dim, (first, size, local_first, local_size) in enumerate(
            zip(box.offset, box.size, piece.offset, piece.local.shape, strict=True)
        ):
            begin, end = max(first, local_first), min(first + size, local_first + local_size)
            if begin >= end:
                break
            target = target.narrow(dim, begin - local_first, end - begin)
            start.append(begin - first)
        else:
            if not box.size:
                yield PlannedRead(key, target.unsqueeze(0), (0,), (1,))
            else:
                yield PlannedRead(key, target, tuple(start), tuple(box.size))


def _check_span(reader: ShardReader, read: PlannedRead, dtype: str) -> None:
    span = reader.spans.get(read.key)
    if span is None or (span.shape or (1,)) != read.stored or span.dtype != dtype:
        raise Damage(f"{reader.file}: {read.key} is not in the file as its table describes it")


def _copy(reader: ShardReader, read: PlannedRead) -> None:
    """By blocks of rows; a row that is only partly wanted is read whole."""
    row_bytes = math.prod(read.stored[1:]) * DTYPE_BYTES[reader.spans[read.key].dtype]
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for done in range(0, read.target.shape[0], rows):
        count = min(rows, read.target.shape[0] - done)
        first = read.start[0] + done
        block = reader.rows(read.key, first, first + count)
        for dim in range(1, len(read.stored)):
            block = block.narrow(dim, read.start[dim], read.target.shape[dim])
        read.target.narrow(0, done, count).copy_(block)
