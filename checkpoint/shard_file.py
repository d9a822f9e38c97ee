"""Shard files: the safetensors file of one rank, staged in memory, hashed while it is written, checked when it is read.

A shard is an ordinary safetensors file (an 8-byte length, a JSON header, the tensors row by row), so other tools can
read it. It is not written by the library because its bytes are hashed in chunks on the way out. On the way in, only
the chunks that hold what is wanted are read, and checked.
"""

import hashlib
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minka.checkpoint.filesystem import Heartbeat
from minka.checkpoint.index import DTYPES, PieceGroup, shard_name
from minka.checkpoint.manifest import Damage
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.parallel.pieces import Pieces
from minka.plan.tensor_name import tensor_name

CODES = dict(zip(DTYPES, "F64 F32 BF16 F16 I64 I32 U8 BOOL".split(), strict=True))
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

    def __init__(self, pieces: Pieces, *, pinned: bool) -> None:
        self._described = _describe(pieces)
        header: dict[str, Any] = {}
        size = 0
        for name in sorted(pieces, key=lambda name: (-pieces[name].local.element_size(), name)):  # keeps all aligned
            dtype, shape = self._described[name]
            first, size = size, size + pieces[name].local.nbytes
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [first, size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = len(text).to_bytes(8, "little") + text
        memory = np.empty(len(start) + size, dtype=np.uint8)
        if pinned:
            _pin(memory)
        self.buffer = torch.from_numpy(memory)
        self.buffer[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        self._views: dict[str, tuple[Tensor, int]] = {}  # in the order of the file, with the end of each
        for name, entry in header.items():
            first, last = (len(start) + at for at in entry["data_offsets"])
            local = pieces[name].local
            self._views[name] = self.buffer[first:last].view(local.dtype).view(local.shape), last

    def fits(self, pieces: Pieces) -> bool:
        """Whether the buffer was made for pieces of these names, types and shapes."""
        return self._described == _describe(pieces)

    def copy_in(self, pieces: Pieces, filled: Callable[[int], None] = lambda upto: None) -> None:
        """Copy the pieces. For tensors on a GPU the copies are queued on the current stream.

        `filled` is called with the end of each copy; for tensors on a CPU, the bytes up to there are final.
        """
        for name, (view, end) in self._views.items():
            source = pieces[name].local.detach()
            if source.device.type == "cpu" and source.is_contiguous():
                # numpy, not torch: it lets other threads run, and does not start a second pool of threads here.
                content, given = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (view, source))
                np.copyto(content, given)
            else:
                view.copy_(source, non_blocking=True)
            filled(end)

    def chunks(self, size: int) -> Iterator[memoryview]:
        """The content of the file."""
        content = self.buffer.numpy().data
        for at in range(0, content.nbytes, size):
            yield content[at : at + size]


class ChunkHasher:
    """The sha256 of each chunk of a staging buffer, computed on a thread from the first chunk that is filled."""

    def __init__(self, staged: StagingBuffer, chunk_bytes: int, alive: Heartbeat) -> None:
        self.staged, self.chunk_bytes, self._alive = staged, chunk_bytes, alive
        self._to_hash = staged.chunks(chunk_bytes)
        self._started: list[Future[str]] = []
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="minka-hash")

    def filled(self, upto: int) -> None:
        """Start the hashes of the chunks within the first `upto` bytes, which do not change any more."""
        size = self.staged.buffer.numel()
        while (at := len(self._started) * self.chunk_bytes) < size and min(at + self.chunk_bytes, size) <= upto:
            self._started.append(self.thread.submit(self._hash, next(self._to_hash)))

    def chunks(self) -> Iterator[memoryview]:
        """The content of the file, with a heartbeat after each chunk that has been written."""
        for chunk in self.staged.chunks(self.chunk_bytes):
            yield chunk
            self._alive()

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
        size = self._fs.size(self.file)
        if size != self.table.bytes:
            raise Damage(f"{self.file} has {size:,} bytes instead of {self.table.bytes:,}")
        length = int.from_bytes(self._read(0, 8), "little") if size >= 8 else 2**62
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise Damage(f"{self.file}: its header claims {length:,} bytes")
        try:
            header = json.loads(self._read(8, 8 + length))
            header.pop("__metadata__", None)
            self._spans = {name: _span(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Damage(f"{self.file}: not a safetensors header: {error}") from None

    def span_of(self, key: str, group: PieceGroup) -> TensorSpan:
        """Where a piece of the table is. The index, the table and the file's own header must agree on it."""
        span, name = self._spans.get(key), tensor_name(key)
        known = self._index[name] if name in self._index.tensors else None
        if known is None or (group.dtype, group.shape) != (known.dtype, known.shape):
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

    def _read(self, first: int, last: int) -> bytearray:
        """Bytes [first, last), from verified chunks. The last chunk is kept: the next read often starts in it."""
        size = self._chunk_bytes
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


def _pin(memory: NDArray[np.uint8]) -> None:
    """Lock the memory for as long as it lives, so that a GPU copies into it alongside the training.

    torch's own pinned memory has a power of two of bytes: up to twice as many. Where the system lets a process lock no
    more, copies wait for the device.
    """
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
        unpin = weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data)
        unpin.atexit = False  # the process ends, and CUDA may have ended before
    else:
        with suppress(RuntimeError, AssertionError):  # CUDA reports it again at the next kernel: this one
            torch.ones(1, device="cuda")


def _span(entry: Mapping[str, Any], begin: int, size: int) -> TensorSpan:
    dtype = DTYPE_OF[entry["dtype"]]
    shape = tuple(int(n) for n in entry["shape"])
    first, last = (begin + int(n) for n in entry["data_offsets"])
    if any(n < 0 for n in shape) or not begin <= first <= last <= size:
        raise ValueError("a tensor is not within the file")
    if last - first != math.prod(shape) * getattr(torch, dtype).itemsize:
        raise ValueError("a tensor has more or fewer bytes than its shape")
    return TensorSpan(first, dtype, shape)


def _describe(pieces: Pieces) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype_name(piece.local), tuple(piece.local.shape)) for name, piece in pieces.items()}


def dtype_name(tensor: Tensor) -> str:
    """Its type's name as files have it: float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")
