"""index.json and the tables: which file of a checkpoint holds which box of which tensor.

    rank-00000.json   the table of rank-00000.safetensors, written by the same rank:
        {"bytes": ..., "sha256": [one a chunk of the shard file],
         "pieces": {key: {"dtype": "float32", "shape": [...], "offset": [...], "size": [...]}}}
    index.json        written by rank 0, and hashed from the manifest:
        {"files": {"rank-00000.safetensors": {"bytes": ..., "table": {"bytes": ..., "sha256": "..."}}},
         "partitions": [{"shape": [...], "boxes": [file, *offset, *size, file, ...]}],
         "tensors": {name: {"dtype": "float32", "partition": 0}}}

`boxes` counts files in the order of `files`. Tensors of one shape that the same files hold in the same way share a
partition, so the index stays small. A rank looks up whose boxes overlap its own, and opens only the tables of those.
"""

import math
from array import array
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
ShardName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")]


class StoredPiece(StrictModel):
    """A box of a tensor of `shape`, as one file holds it."""

    dtype: Dtype
    shape: list[Count]
    offset: list[Count]
    size: list[Count]

    def fits(self) -> bool:
        """Whether the box has the dimensions of the tensor."""
        return len(self.offset) == len(self.size) == len(self.shape)


class Table(StrictModel):
    """What one shard file holds: its size, the hashes of its chunks, and its pieces by their keys in it."""

    bytes: Count
    sha256: list[Sha256]
    pieces: dict[str, StoredPiece]


class ShardEntry(StrictModel):
    """A shard file in the index; formats 1 and 2 had no file for its table."""

    bytes: Count
    table: Sealed | None


class Partition(StrictModel):
    """How a tensor of `shape` is cut: `boxes` are records of file number, offset and size."""

    shape: list[Count]
    boxes: list[Count]
    _records: np.ndarray = PrivateAttr()  # [boxes, 1 + 2 * dimensions]

    @model_validator(mode="after")
    def _check(self) -> "Partition":
        dims = len(self.shape)
        if math.prod(max(n, 1) for n in self.shape) >= MAX_NUMBERS:
            raise ValueError("the shape is too large")
        self._records = np.array(self.boxes, dtype=np.int64).reshape(-1, 1 + 2 * dims)
        if (self._records[:, 1 : 1 + dims] + self._records[:, 1 + dims :] > self.shape).any():
            raise ValueError("a box extends beyond the tensor")
        return self

    @property
    def highest_file(self) -> int:
        """The highest number of a file; -1 without boxes."""
        return int(self._records[:, 0].max(initial=-1))

    def overlapping(self, offset: Sequence[int], size: Sequence[int]) -> list[int]:
        """Numbers of the files with a box that overlaps this one."""
        first, dims = np.array(offset, dtype=np.int64), len(self.shape)
        starts, sizes = self._records[:, 1 : 1 + dims], self._records[:, 1 + dims :]
        hit = (np.maximum(starts, first) < np.minimum(starts + sizes, first + np.array(size, dtype=np.int64))).all(1)
        return [int(number) for number in np.unique(self._records[hit, 0])]


class TensorEntry(StrictModel):
    """A tensor in the index."""

    dtype: Dtype
    partition: Count


class Index(StrictModel):
    """All shard files and tensors of a checkpoint."""

    files: dict[ShardName, ShardEntry]
    partitions: list[Partition]
    tensors: dict[str, TensorEntry]
    _names: list[str] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> "Index":
        self._names = list(self.files)
        if any(partition.highest_file >= len(self.files) for partition in self.partitions):
            raise ValueError("a box is in a file that is not listed")
        if any(entry.partition >= len(self.partitions) for entry in self.tensors.values()):
            raise ValueError("a tensor has a partition that is not listed")
        return self

    def shape(self, name: str) -> list[int]:
        """Global shape of a tensor."""
        return self.partitions[self.tensors[name].partition].shape

    def nbytes(self, name: str) -> int:
        """Bytes of a whole tensor."""
        return math.prod(self.shape(name)) * getattr(torch, self.tensors[name].dtype).itemsize

    def files_with(self, name: str, offset: Sequence[int], size: Sequence[int]) -> list[str]:
        """Files that hold a part of this box of a tensor, in the order of `files`."""
        partition = self.partitions[self.tensors[name].partition]
        return [self._names[number] for number in partition.overlapping(offset, size)]


def build_index(shards: Iterable[tuple[str, ShardEntry, Table]]) -> Index:
    """The index of these files. Tables may be made one at a time: none is kept."""
    files: dict[str, ShardEntry] = {}
    boxes: dict[tuple[str, str, tuple[int, ...]], array[int]] = {}
    for name, entry, table in shards:
        for key, piece in table.pieces.items():
            if not piece.fits():
                raise ValueError(f"{key}: shape, offset and size differ in dimensions")
            tensor = (tensor_name(key), piece.dtype, tuple(piece.shape))
            boxes.setdefault(tensor, array("q")).extend((len(files), *piece.offset, *piece.size))
        files[name] = entry
    tensors: dict[str, TensorEntry] = {}
    partitions: list[Partition] = []
    known: dict[tuple[tuple[int, ...], bytes], int] = {}
    for (name, dtype, shape), records in boxes.items():
        number = known.setdefault((shape, records.tobytes()), len(partitions))
        if number == len(partitions):
            partitions.append(Partition(shape=list(shape), boxes=records.tolist()))
        if name in tensors:
            raise ValueError(f"{name} has different shapes or types in different files")
        tensors[name] = TensorEntry(dtype=dtype, partition=number)
    return Index(files=files, partitions=partitions, tensors=tensors)


def table_name(shard: str) -> str:
    """The file with the table of a shard file."""
    return shard.replace(".safetensors", ".json")
