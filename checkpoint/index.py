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
from collections.abc import Iterable, KeysView, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from minka.checkpoint.manifest import Count, Sealed, Sha256, StrictModel
from minka.plan.tensor_name import tensor_name

INDEX = "index.json"
MAX_NUMBERS = 2**60  # in a tensor: torch takes no larger shape, even of an empty tensor

DTYPES = "float64 float32 bfloat16 float16 int64 int32 uint8 bool".split()
Dtype = Annotated[str, Field(pattern=f"^({'|'.join(DTYPES)})$")]


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
    _ranks: np.ndarray = PrivateAttr()  # [boxes]
    _starts: np.ndarray = PrivateAttr()  # [boxes, dimensions], as are the ends
    _ends: np.ndarray = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> "TensorGroup":
        dims = len(self.shape)
        if math.prod(max(n, 1) for n in self.shape) >= MAX_NUMBERS:
            raise ValueError("the shape is too large")
        records = np.array(self.boxes, dtype=np.int64).reshape(-1, 1 + 2 * dims)
        self._ranks, self._starts = records[:, 0], records[:, 1 : 1 + dims]
        self._ends = self._starts + records[:, 1 + dims :]
        if (self._ends > self.shape).any():
            raise ValueError("a box extends beyond the tensor")
        return self

    def overlapping(self, offset: Sequence[int], size: Sequence[int]) -> list[int]:
        """Ranks with a box that overlaps this one."""
        hit = (np.maximum(self._starts, offset) < np.minimum(self._ends, np.add(offset, size))).all(1)
        ranks: list[int] = self._ranks[hit].tolist()
        return ranks


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
        self._of = defaultdict(list)
        for group in self.groups:
            if group._ranks.max(initial=-1) >= len(self.bytes):
                raise ValueError("a box is in a file that is not listed")
            for name in group.tensors:
                self._of[name].append(group)
                if (group.dtype, group.shape) != (self[name].dtype, self[name].shape):
                    raise ValueError(f"{name} has two shapes or types")
        return self

    @property
    def tensors(self) -> KeysView[str]:
        """Names of all tensors."""
        return self._of.keys()

    def __getitem__(self, name: str) -> TensorGroup:
        """A group of this tensor: all have its dtype and global shape."""
        return self._of[name][0]

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
    """Name of the file with a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def table_name(rank: int) -> str:
    """Name of the file that says what is where in a rank's shard."""
    return f"rank-{rank:05d}.json"
