"""index.json and the tables: which shard file of a checkpoint holds which box of which tensor.

    rank-00000.json   the table of rank-00000.safetensors, written by the same rank:
        {"bytes": ..., "sha256": [one a chunk of the shard file],
         "groups": [{"dtype": "float32", "shape": [...], "offset": [...], "size": [...], "keys": [...]}]}
    index.json        written by rank 0, and hashed from the manifest; the first three have an entry a rank:
        {"bytes": [...], "table_bytes": [...], "table_sha256": [...],
         "groups": [{"dtype": "float32", "shape": [...], "tensors": [...], "boxes": [rank, *offset, *size, rank, ...]}]}

Tensors that are cut alike form a group, so both stay small. A rank looks up in the index whose boxes overlap its own,
and opens only the tables of those.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator

from minka.checkpoint.manifest import Count, Sealed, Sha256, StrictModel
from minka.parallel.pieces import tensor_name

INDEX = "index.json"
MAX_NUMBERS = 2**60  # in a tensor: torch takes no larger shape, even of an empty tensor

Dtype = Annotated[str, Field(pattern="^(float64|float32|bfloat16|float16|int64|int32|uint8|bool)$")]


class PieceGroup(StrictModel):
    """Pieces of one shard file, `keys`, that are the same box of tensors of `shape`."""

    dtype: Dtype
    shape: list[Count]
    offset: list[Count]
    size: list[Count]
    keys: list[str]

    @model_validator(mode="after")
    def _check(self) -> "PieceGroup":
        if not len(self.offset) == len(self.size) == len(self.shape):
            raise ValueError("shape, offset and size differ in dimensions")
        return self


class Table(StrictModel):
    """What one shard file holds: its size, the hashes of its chunks, and its pieces."""

    bytes: Count
    sha256: list[Sha256]
    groups: list[PieceGroup]


class TensorGroup(StrictModel):
    """Tensors of `shape` that are cut alike; `boxes` are records of rank, offset and size."""

    dtype: Dtype
    shape: list[Count]
    tensors: list[str]
    boxes: list[Count]
    _records: np.ndarray = PrivateAttr()  # [boxes, 1 + 2 * dimensions]

    @model_validator(mode="after")
    def _check(self) -> "TensorGroup":
        dims = len(self.shape)
        if math.prod(max(n, 1) for n in self.shape) >= MAX_NUMBERS:
            raise ValueError("the shape is too large")
        self._records = np.array(self.boxes, dtype=np.int64).reshape(-1, 1 + 2 * dims)
        if (self._records[:, 1 : 1 + dims] + self._records[:, 1 + dims :] > self.shape).any():
            raise ValueError("a box extends beyond the tensor")
        return self

    @property
    def highest_rank(self) -> int:
        """-1 without boxes."""
        return int(self._records[:, 0].max(initial=-1))

    def overlapping(self, offset: Sequence[int], size: Sequence[int]) -> list[int]:
        """Ranks with a box that overlaps this one."""
        dims = len(self.shape)
        first, last = np.array(offset, dtype=np.int64), np.array([a + n for a, n in zip(offset, size, strict=True)])
        starts, sizes = self._records[:, 1 : 1 + dims], self._records[:, 1 + dims :]
        hit = (np.maximum(starts, first) < np.minimum(starts + sizes, last)).all(1)
        return [int(rank) for rank in self._records[hit, 0]]


class Index(StrictModel):
    """All shard files and tensors of a checkpoint. Formats 1 and 2 had no files for the tables."""

    bytes: list[Count]
    table_bytes: list[Count]
    table_sha256: list[Sha256]
    groups: list[TensorGroup]
    _of: dict[str, list[TensorGroup]] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> "Index":
        if not (len(self.table_bytes) == len(self.table_sha256) in (0, len(self.bytes))):
            raise ValueError("ranks without a table")
        if any(group.highest_rank >= len(self.bytes) for group in self.groups):
            raise ValueError("a box is in a file that is not listed")
        self._of = defaultdict(list)
        for group in self.groups:
            for name in group.tensors:
                self._of[name].append(group)
                if (group.dtype, group.shape) != (self.dtype(name), self.shape(name)):
                    raise ValueError(f"{name} has two shapes or types")
        self._of = dict(self._of)
        return self

    @property
    def tensors(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._of.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def shape(self, name: str) -> list[int]:
        """Global shape of a tensor."""
        return self._of[name][0].shape

    def dtype(self, name: str) -> str:
        """Its type as torch names it."""
        return self._of[name][0].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a whole tensor."""
        return math.prod(self.shape(name)) * int(getattr(torch, self.dtype(name)).itemsize)

    def ranks_with(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[int]:
        """The ranks that have written a part of this box of a tensor, ascending."""
        return sorted({rank for group in self._of[name] for rank in group.overlapping(offset, size)})


def build_index(tables: Iterable[tuple[Table, Sealed | None]]) -> Index:
    """The index of these tables, in the order of the ranks. None of the tables is kept."""
    sizes: list[int] = []
    sealed: list[Sealed] = []
    boxes: dict[tuple[str, tuple[int, ...], tuple[str, ...]], array[int]] = {}
    for table, seal in tables:
        for group in table.groups:
            names = tuple(dict.fromkeys(map(tensor_name, group.keys)))
            records = boxes.setdefault((group.dtype, tuple(group.shape), names), array("q"))
            records.extend((len(sizes), *group.offset, *group.size))
        sizes.append(table.bytes)
        sealed += [seal] if seal else []
    return Index(
        bytes=sizes,
        table_bytes=[seal.bytes for seal in sealed],
        table_sha256=[seal.sha256 for seal in sealed],
        groups=[
            TensorGroup(dtype=dtype, shape=list(shape), tensors=list(names), boxes=records.tolist())
            for (dtype, shape, names), records in boxes.items()
        ],
    )


def shard_name(rank: int) -> str:
    """The file with the pieces that a rank has written."""
    return f"rank-{rank:05d}.safetensors"


def table_name(rank: int) -> str:
    """The file with their table."""
    return f"rank-{rank:05d}.json"
