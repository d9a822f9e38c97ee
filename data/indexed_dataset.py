"""Megatron's indexed dataset: NAME.bin contains raw little-endian tokens, NAME.idx the offset of each document.

.idx: "MMIDIDX\\0\\0", u64 version = 1, u8 dtype code, u64 sequences S, u64 D = documents + 1, then i32 lengths[S],
i64 byte offsets[S], i64 document index[D]. Here a sequence is a document, its end-of-document token included.
Layout: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import struct
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minka.plan.errors import UserError
from minka.plan.read_file import reading

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes, no padding
DTYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SMALL_VOCAB = 65_500  # below it Megatron stores u16, else i32
LONGEST = 2**31 - 1  # lengths are i32
CHUNK = 1 << 20  # index entries written at once


class DatasetIndex(NamedTuple):
    """An .idx. lengths (tokens) and pointers (bytes) are [S], mapped from disk; document_index is [S + 1]."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    document_index: NDArray[np.int64]


def token_dtype(vocab: int) -> np.dtype[Any]:
    """The type in which Megatron stores ids below `vocab`."""
    return np.dtype("<u2" if vocab < SMALL_VOCAB else "<i4")


def finish_index(file: IO[bytes], dtype: np.dtype[Any]) -> None:
    """Complete an .idx that so far has HEADER.size bytes of anything and the lengths. In bounded memory."""
    file.flush()
    lengths = np.memmap(file.name, dtype="<i4", mode="r", offset=HEADER.size)
    size, end = len(lengths), 0
    for start in range(0, size, CHUNK):
        sizes = lengths[start : start + CHUNK].astype("<i8") * dtype.itemsize
        ends = end + np.cumsum(sizes)
        file.write((ends - sizes).tobytes())
        end = int(ends[-1])
    for start in range(0, size + 1, CHUNK):
        file.write(np.arange(start, min(size + 1, start + CHUNK), dtype="<i8").tobytes())
    file.seek(0)
    code = next(code for code, name in DTYPE_CODES.items() if np.dtype(name) == dtype)
    file.write(HEADER.pack(MAGIC, 1, code, size, size + 1))


def read_index(path: Path) -> DatasetIndex:
    """Map an .idx. Raises UserError when it is not an .idx or is cut short."""
    with reading(path, "an index", ValueError, struct.error):
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        magic, version, code, size, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in DTYPE_CODES:
        raise UserError("not a Megatron index of version 1", where=str(path))
    ends = np.cumsum([HEADER.size, 4 * size, 8 * size, 8 * documents])
    if len(raw) < ends[-1]:
        raise UserError(f"the index is cut short: it has {len(raw)} bytes and needs {ends[-1]}", where=str(path))
    parts = [np.asarray(raw[a:b]) for a, b in pairwise(ends)]
    return DatasetIndex(np.dtype(DTYPE_CODES[code]), parts[0].view("<i4"), parts[1].view("<i8"), parts[2].view("<i8"))


def read_tokens(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map a .bin: all tokens of the split, [N]. Raises UserError when its size is not a multiple of a token's."""
    with reading(path, "tokens", ValueError):
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
