"""Shard files: the safetensors of one rank, laid out in memory as on the disk, hashed while written, checked when read.

A shard is a safetensors file like any other (an 8-byte length, a JSON header, the tensors row by row), so other tools
can read it. Written here and not by the library because its bytes are hashed in chunks on the way out, and only the
chunks that hold what is wanted are read, and checked, on the way in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minka.checkpoint.filesystem import Disk
from minka.checkpoint.manifest import DTYPES, Damage
from minka.parallel.pieces import Piece

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
MOST_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
ALIGNMENT = 8


class TensorSpan(NamedTuple):
    """Where a tensor lies in its file: bytes [first, last), and how they are to be taken."""

    first: int
    last: int
    dtype: str
    shape: tuple[int, ...]


class Image:
    """The staging buffer of one rank: its shard file as it will lie on the disk. Made once, filled at every save."""

    def __init__(self, pieces: Mapping[str, Piece], *, pinned: bool) -> None:
        self._kinds = _kinds(pieces)
        names = sorted(pieces, key=lambda name: (-pieces[name].local.element_size(), name))  # keeps every one aligned
        header, body = _header([(name, *self._kinds[name]) for name in names])
        self.buffer = torch.empty(len(header) + body, dtype=torch.uint8, pin_memory=pinned)
        self.buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._boxes: dict[str, Tensor] = {}  # in the order in which they lie in the file
        at = len(header)
        for name in names:
            local = pieces[name].local
            size = local.numel() * local.element_size()
            self._boxes[name] = self.buffer[at : at + size].view(local.dtype).view(local.shape)
            at += size

    def fits(self, pieces: Mapping[str, Piece]) -> bool:
        """Whether this image has a place for just these."""
        return self._kinds == _kinds(pieces)

    def take(self, pieces: Mapping[str, Piece], filled: Callable[[int], None] = lambda at: None) -> None:
        """Copy them in. For tensors on a GPU the copies are queued on the current stream.

        `filled` is told up to where the copies reach: for tensors on a CPU those bytes are there.
        """
        at = self.buffer.numel() - sum(box.numel() * box.element_size() for box in self._boxes.values())
        for name, box in self._boxes.items():
            source = pieces[name].local.detach()
            if source.device.type == "cpu" and source.is_contiguous():
                # numpy, not torch: it lets other threads run, and does not start a second pool of threads here.
                np.copyto(_bytes(box), _bytes(source))
            else:
                box.copy_(source, non_blocking=True)
            at += box.numel() * box.element_size()
            filled(at)

    def chunks(self, size: int) -> Iterator[memoryview]:
        """The file's content."""
        whole = self.buffer.numpy().data
        for at in range(0, whole.nbytes, size):
            yield whole[at : at + size]


class Hashes:
    """The sha256 of each chunk of an image, on a thread beside the one that fills and writes it.

    They begin with the first chunk that is filled, not with the writing: a fast disk takes no longer than they do.
    """

    def __init__(self, image: Image, chunk: int, alive: Callable[[], None]) -> None:
        self.image, self.chunk, self._alive = image, chunk, alive
        self._parts = image.chunks(chunk)
        self._begun: list[Future[str]] = []
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="minka-hash")

    def __enter__(self) -> "Hashes":
        return self

    def __exit__(self, *error: object) -> None:
        self._beside.shutdown(cancel_futures=True)

    def upto(self, filled: int) -> None:
        """So many bytes of the image will not change any more: begin with the chunks that lie in them."""
        size = self.image.buffer.numel()
        while (at := len(self._begun) * self.chunk) < size and min(at + self.chunk, size) <= filled:
            self._begun.append(self._beside.submit(self._hash, next(self._parts)))

    def result(self) -> list[str]:
        """All of them, once they are there; then the image must be filled."""
        self.upto(self.image.buffer.numel())
        return [one.result() for one in self._begun]

    def _hash(self, part: memoryview) -> str:
        found = hashlib.sha256(part).hexdigest()
        self._alive()
        return found


class ShardReader:
    """Reads one shard; every byte it gives out was in a chunk whose hash held. Raises OSError and Damage."""

    def __init__(
        self, disk: Disk, file: Path, entry: Mapping[str, Any], chunk_bytes: int, alive: Callable[[], None]
    ) -> None:
        self.file, self._disk, self._alive = file, disk, alive
        self._hashes, self._bytes, self._chunk_bytes = entry["sha256"], int(entry["bytes"]), chunk_bytes
        self._cached: tuple[int, bytearray] = (-1, bytearray())
        self.spans = self._read_header()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor's first dimension; a scalar is one row of shape (1,)."""
        span = self.spans[name]
        shape = span.shape or (1,)
        row = math.prod(shape[1:]) * DTYPES[span.dtype]
        raw = self._at(span.first + first * row, span.first + last * row)
        return torch.frombuffer(raw, dtype=getattr(torch, span.dtype)).view(last - first, *shape[1:])

    def _read_header(self) -> dict[str, TensorSpan]:
        size = self._disk.size(self.file)
        if size != self._bytes:
            raise Damage(f"{self.file} has {size:,} bytes instead of {self._bytes:,}")
        length = int.from_bytes(self._at(0, 8), "little") if size >= 8 else 2**62
        if length > min(MOST_HEADER_BYTES, size - 8):
            raise Damage(f"{self.file}: its header claims {length:,} bytes")
        try:
            header = json.loads(bytes(self._at(8, 8 + length)))
            header.pop("__metadata__", None)
            spans = {name: _span(entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Damage(f"{self.file}: its header is none of safetensors: {error}") from None
        return spans

    def _at(self, first: int, last: int) -> bytearray | memoryview:
        """Bytes [first, last), from verified chunks; the last chunk is kept, since what is read next lies behind."""
        size = self._chunk_bytes
        if first // size == (last - 1) // size:
            at = first // size * size
            return memoryview(self._chunk(first // size))[first - at : last - at]
        room = bytearray(last - first)
        for index in range(first // size, -(-last // size)):
            at = index * size
            begin, end = max(first, at), min(last, at + size)
            room[begin - first : end - first] = memoryview(self._chunk(index))[begin - at : end - at]
        return room

    def _chunk(self, index: int) -> bytearray:
        if self._cached[0] != index:
            at = index * self._chunk_bytes
            content = self._disk.read(self.file, at, min(self._chunk_bytes, self._bytes - at))
            if hashlib.sha256(content).hexdigest() != self._hashes[index]:
                raise Damage(f"{self.file}: chunk {index} ({self._chunk_bytes:,} bytes each) does not match its hash")
            self._cached = (index, content)
            self._alive()
        return self._cached[1]


def _span(entry: Mapping[str, Any], begin: int, size: int) -> TensorSpan:
    dtype = DTYPE_OF[entry["dtype"]]
    shape = tuple(int(n) for n in entry["shape"])
    first, last = (begin + int(n) for n in entry["data_offsets"])
    if any(n < 0 for n in shape) or not begin <= first <= last <= size:
        raise ValueError("a tensor lies outside the file")
    if last - first != math.prod(shape) * DTYPES[dtype]:
        raise ValueError("a tensor's bytes are not those of its shape")
    return TensorSpan(first, last, dtype, shape)


def _header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, and how many follow them."""
    table, at = {}, 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPES[dtype]
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, at


def _kinds(pieces: Mapping[str, Piece]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {n: (str(p.local.dtype).removeprefix("torch."), tuple(p.local.shape)) for n, p in pieces.items()}


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
