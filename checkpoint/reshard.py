"""From shards of any layout into this rank's boxes: torch.distributed.checkpoint plans, our reader reads."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from minka.checkpoint.filesystem import Disk
from minka.checkpoint.manifest import DTYPES, Damage
from minka.checkpoint.shard_file import ShardReader
from minka.parallel.pieces import Piece, tensor_name

BLOCK_BYTES = 32 * 2**20  # read at once: what a restore needs of memory beside the boxes it fills


class PlannedRead(NamedTuple):
    """A box of a stored piece that goes into a box of a local tensor."""

    key: str  # of the stored piece in its file
    dtype: str
    target: Tensor
    from_: tuple[int, ...]  # where it begins in the stored piece
    size: tuple[int, ...]
    stored: tuple[int, ...]  # the stored piece's shape


def fill(
    path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Piece], alive: Callable[[], None], disk: Disk
) -> None:
    """Copy what the checkpoint `path` holds of `tensors` into them. Raises OSError and Damage; some are filled then.

    Each file is read from front to back, and only the chunks that hold something wanted.
    """
    with torch.no_grad():
        for file, parts in _plan(path, manifest, tensors).items():
            reader = ShardReader(disk, path / file, manifest["files"][file], manifest["chunk_bytes"], alive)
            for part in parts:
                _check_span(reader, part)
            for part in sorted(parts, key=lambda p: reader.spans[p.key].first):
                _read(reader, part)


def _plan(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Piece]) -> dict[str, list[PlannedRead]]:
    files: dict[str, list[PlannedRead]] = defaultdict(list)
    for key, piece in tensors.items():
        name = tensor_name(key)
        entry, filled = manifest["tensors"][name], 0
        stored = [(torch.Size(p["offset"]), torch.Size(p["size"])) for p in entry["pieces"]]
        # A scalar is one row of one: the planner wants dimensions.
        there = [ChunkStorageMetadata(o or torch.Size([0]), s or torch.Size([1])) for o, s in stored]
        local = piece.local if piece.local.ndim else piece.local.unsqueeze(0)
        here = ChunkStorageMetadata(torch.Size(piece.offset) or torch.Size([0]), local.shape)
        about = TensorStorageMetadata(TensorProperties(), torch.Size(entry["shape"]) or torch.Size([1]), there)
        for item in create_read_items_for_chunk_list(name, about, [here]) if local.numel() else []:
            source = item.storage_index.index
            assert source is not None  # the planner gives each item the number of the chunk it is from
            target = local
            for dim, (at, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                target = target.narrow(dim, at, length)
            stored_key = entry["pieces"][source].get("key", name)
            begin, size, stored_size = tuple(item.storage_offsets), tuple(item.lengths), tuple(there[source].sizes)
            part = PlannedRead(stored_key, entry["dtype"], target, begin, size, stored_size)
            files[entry["pieces"][source]["file"]].append(part)
            filled += target.numel()
        if filled != piece.local.numel():
            raise Damage(f"{path}: {name} has {filled:,} of {piece.local.numel():,} numbers of this rank's box")
    return files


def _check_span(reader: ShardReader, part: PlannedRead) -> None:
    span = reader.spans.get(part.key)
    if span is None or (span.shape or (1,)) != part.stored or span.dtype != part.dtype:
        raise Damage(f"{reader.file}: {part.key} is not there as the manifest has it")


def _read(reader: ShardReader, part: PlannedRead) -> None:
    """By blocks of rows; a row that is only partly wanted is read whole."""
    row_bytes = math.prod(part.stored[1:]) * DTYPES[reader.spans[part.key].dtype]
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for done in range(0, part.size[0], rows):
        count = min(rows, part.size[0] - done)
        block = reader.rows(part.key, part.from_[0] + done, part.from_[0] + done + count)
        for dim in range(1, len(part.stored)):
            block = block.narrow(dim, part.from_[dim], part.size[dim])
        part.target.narrow(0, done, count).copy_(block)
