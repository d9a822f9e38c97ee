"""Shard files: the safetensors file of one rank, staged in memory, hashed while it is written, checked when it is read.

A shard is an ordinary safetensors file (an 8-byte length, a JSON header, the tensors row by row), so other tools can
read it. It is not written by the library because its bytes are hashed in chunks on the way out. On the way in, only
the chunks that hold what is wanted are read, and checked.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minka.checkpoint.index import PieceGroup, shard_name
from minka.checkpoint.manifest import Damage
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.pieces import Piece, tensor_name

CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPE_OF = {code: dtype for dtype, code in CODES.items()}
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
ALIGNMENT = 8


class TensorSpan(NamedTuple):
    """Where a tensor is in its file: its first byte, its type and its shape."""

    first: int
    dtype: str
    shape: tuple[int, ...]


class StagingBuffer:
    """One rank's shard file in memory, as it will be on the disk. Allocated once, filled at every save."""

    def __init__(self, pieces: Mapping[str, Piece], *, pinned: bool) -> None:
        self._described = _describe(pieces)
        names = sorted(pieces, key=lambda name: (-pieces[name].local.element_size(), name))  # keeps all aligned
        header, body = _header([(name, *self._described[name]) for name in names])
        self.buffer = torch.empty(len(header) + body, dtype=torch.uint8, pin_memory=pinned)
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}  # in the order of the file
        at = self._header_bytes = len(header)
        for name in names:
            local = pieces[name].local
            size = local.numel() * local.element_size()
            self._views[name] = self.buffer[at : at + size].view(local.dtype).view(local.shape)
            at += size

    def fits(self, pieces: Mapping[str, Piece]) -> bool:
        """Whether the buffer was made for pieces of these names, types and shapes."""
        return self._described == _describe(pieces)

    def copy_in(self, pieces: Mapping[str, Piece], filled: Callable[[int], None] = lambda upto: None) -> None:
        """Copy the pieces. For tensors on a GPU the copies are queued on the current stream.

        `filled` is called with the end of each copy; for tensors on a CPU, the bytes up to there are final.
        """
        at = self._header_bytes
        for name, view in self._views.items():
            source = pieces[name].local.detach()
            if source.device.type == "cpu" and source.is_contiguous():
                # numpy, not torch: it lets other threads run, and does not start a second pool of threads here.
                np.copyto(_bytes(view), _bytes(source))
            else:
                view.copy_(source, non_blocking=True)
            at += view.numel() * view.element_size()
            filled(at)

    def chunks(self, size: int) -> Iterator[memoryview]:
        """The content of the file."""
        content = self.buffer.numpy().data
        for at in range(0, content.nbytes, size):
            yield content[at : at + size]


class ChunkHasher:
    """The sha256 of each chunk of a staging buffer, computed on a thread while the buffer is filled and written.

    Hashing starts with the first chunk that is filled, not with the first write: a fast disk takes no longer than the
    hashes do.
    """

    def __init__(self, staged: StagingBuffer, chunk_bytes: int, alive: Callable[[], None]) -> None:
        self.staged, self.chunk_bytes, self._alive = staged, chunk_bytes, alive
        self._chunks = staged.chunks(chunk_bytes)
        self._started: list[Future[str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minka-hash")

    def __enter__(self) -> "ChunkHasher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def filled(self, upto: int) -> None:
        """Start the hashes of the chunks within the first `upto` bytes, which do not change any more."""
        size = self.staged.buffer.numel()
        while (at := len(self._started) * self.chunk_bytes) < size and min(at + self.chunk_bytes, size) <= upto:
            self._started.append(self._thread.submit(self._hash, next(self._chunks)))

    def result(self) -> list[str]:
        """Wait for the hashes of all chunks; the buffer must be filled."""
        self.filled(self.staged.buffer.numel())
        return [one.result() for one in self._started]

    def _hash(self, chunk: memoryview) -> str:
        digest = hashlib.sha256(chunk).hexdigest()
        self._alive()
        return digest


class ShardReader:
    """Reads one shard file; every byte that it returns was in a chunk whose hash matched. Raises OSError and Damage."""

    def __init__(self, checkpoint: StoredCheckpoint, rank: int) -> None:
        self.file, self.table = checkpoint.path / shard_name(rank), checkpoint.table(rank)
        self._index, self._fs, self._alive = checkpoint.index, checkpoint.fs, checkpoint.alive
        self._chunk_bytes = checkpoint.header.chunk_bytes
        if len(self.table.sha256) != -(-self.table.bytes // self._chunk_bytes):
            hashes = f"{len(self.table.sha256)} hashes for {self.table.bytes:,} bytes"
            raise Damage(f"{self.file}: its table has {hashes} in chunks of {self._chunk_bytes:,}")
        self._cached: tuple[int, bytearray] = (-1, bytearray())
        self._spans = self._read_header()

    def span_of(self, key: str, group: PieceGroup) -> TensorSpan:
        """Where a piece of the table is. The index, the table and the file's own header must agree on it."""
        span, name = self._spans.get(key), tensor_name(key)
        if name not in self._index or (group.dtype, group.shape) != (self._index.dtype(name), self._index.shape(name)):
            raise Damage(f"{self.file}: its table and the index differ in {key}")
        if span is None or (span.dtype, list(span.shape)) != (group.dtype, group.size):
            raise Damage(f"{self.file}: {key} is not in the file as its table describes it")
        return span

    def rows(self, span: TensorSpan, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor's first dimension; a scalar is one row of shape (1,)."""
        dtype, shape = getattr(torch, span.dtype), span.shape or (1,)
        row = math.prod(shape[1:]) * dtype.itemsize
        raw = self._read(span.first + first * row, span.first + last * row)
        return torch.frombuffer(raw, dtype=dtype).view(last - first, *shape[1:])

    def _read_header(self) -> dict[str, TensorSpan]:
        size = self._fs.size(self.file)
        if size != self.table.bytes:
            raise Damage(f"{self.file} has {size:,} bytes instead of {self.table.bytes:,}")
        length = int.from_bytes(self._read(0, 8), "little") if size >= 8 else 2**62
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise Damage(f"{self.file}: its header claims {length:,} bytes")
        try:
            header = json.loads(bytes(self._read(8, 8 + length)))
            header.pop("__metadata__", None)
            return {name: _span(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Damage(f"{self.file}: not a safetensors header: {error}") from None

    def _read(self, first: int, last: int) -> bytearray | memoryview:
        """Bytes [first, last), from verified chunks. The last chunk is kept: the next read often starts in it."""
        size = self._chunk_bytes
        if first // size == (last - 1) // size:
            at = first // size * size
            return memoryview(self._chunk(first // size))[first - at : last - at]
        content = bytearray(last - first)
        for index in range(first // size, -(-last // size)):
            at = index * size
            begin, end = max(first, at), min(last, at + size)
            content[begin - first : end - first] = memoryview(self._chunk(index))[begin - at : end - at]
        return content

    def _chunk(self, index: int) -> bytearray:
        if self._cached[0] != index:
            at = index * self._chunk_bytes
            content = self._fs.read(self.file, at, min(self._chunk_bytes, self.table.bytes - at))
            if hashlib.sha256(content).hexdigest() != self.table.sha256[index]:
                raise Damage(f"{self.file}: chunk {index} ({self._chunk_bytes:,} bytes each) does not match its hash")
            self._cached = (index, content)
            self._alive()
        return self._cached[1]


def _span(entry: Mapping[str, Any], begin: int, size: int) -> TensorSpan:
    dtype = DTYPE_OF[entry["dtype"]]
    shape = tuple(int(n) for n in entry["shape"])
    first, last = (begin + int(n) for n in entry["data_offsets"])
    if any(n < 0 for n in shape) or not begin <= first <= last <= size:
        raise ValueError("a tensor is not within the file")
    if last - first != math.prod(shape) * getattr(torch, dtype).itemsize:
        raise ValueError("a tensor has more or fewer bytes than its shape")
    return TensorSpan(first, dtype, shape)


def _header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, and how many follow them."""
    table, at = {}, 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, at


def _describe(pieces: Mapping[str, Piece]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype_name(piece.local), tuple(piece.local.shape)) for name, piece in pieces.items()}


def dtype_name(tensor: Tensor) -> str:
    """Its type's name as files have it: float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
