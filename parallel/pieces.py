"""A piece: the box of a global tensor that one rank holds. Checkpoints, norms and initial weights work on pieces."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

# torch's norm on a CPU adds up in a few fp32 lanes: of 2^16 numbers it loses 2e-7, of 2^26 already 0.6 %.
LARGE, PART = 2**16, 2**12


class Piece(NamedTuple):
    """`local` is the box of a tensor of `global_shape` that begins at `offset`.

    `copies` ranks hold the same box; this rank's is number `copy`.
    """

    local: Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    copies: int = 1
    copy: int = 0


Pieces = Mapping[str, Piece]  # by name


def piece_of(tensor: Tensor) -> Piece:
    """The piece of a DTensor that is on this rank; a plain tensor is whole, with a copy on every rank."""
    if isinstance(tensor, DTensor):
        return _box(tensor)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    copies, copy = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    return Piece(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape), copies, copy)


def parameter_piece(parameter: Tensor) -> Piece:
    """The piece of a parameter; a plain parameter is whole and on this rank alone, or it would be a DTensor."""
    if isinstance(parameter, DTensor):
        return _box(parameter)
    return Piece(parameter.detach(), (0,) * parameter.ndim, tuple(parameter.shape))


def _box(tensor: DTensor) -> Piece:
    """A dimension that two axes cut is cut by the inner axis (tensor) first: FSDP then cuts each part."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None  # every rank is on the mesh
    offset, size = [0] * tensor.ndim, list(tensor.shape)
    copies, copy = 1, 0
    for axis in reversed(range(tensor.device_mesh.ndim)):
        placement, ways = tensor.placements[axis], tensor.device_mesh.size(axis)
        if isinstance(placement, Replicate):  # `is_shard()` is false for a strided shard
            copy, copies = copy + copies * coordinate[axis], copies * ways
            continue
        dim = placement.dim  # type: ignore[attr-defined]  # Shard and _StridedShard; nothing else is a parameter's
        each = -(-size[dim] // ways)  # as torch.chunk: the last ones may have fewer, or none
        first = min(each * coordinate[axis], size[dim])
        offset[dim], size[dim] = offset[dim] + first, min(each, size[dim] - first)
    local = tensor.to_local().detach()
    assert list(local.shape) == size, f"expected a shard of shape {size}, found {list(local.shape)}"
    return Piece(local, tuple(offset), tuple(tensor.shape), copies, copy)


def to_write(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """What this rank writes of its pieces: of each box one copy is written, and the copies share the work.

    Each box goes to the copy that has the least so far. Ranks agree without communication, since all that hold the
    same boxes go through the same names and global shapes in the same order.
    """
    loads: dict[int, list[int]] = {}
    mine = {}
    for name, piece in pieces.items():
        load = loads.setdefault(piece.copies, [0] * piece.copies)
        writer = load.index(min(load))
        load[writer] += math.prod(piece.global_shape) + 1  # ties go round
        if writer == piece.copy and piece.local.numel():
            mine[name] = piece
    return mine


def squared_norm(pieces: list[Piece]) -> Tensor:
    """This rank's part of the squared norm over all pieces, fp64 scalar; summed over ranks it is the whole."""
    squares: list[Tensor] = []
    small: dict[int, list[Tensor]] = {}
    for p in pieces:
        if p.local.device.type == "cpu" and p.local.numel() > LARGE:  # a GPU adds up in many parts anyway
            squares.append(_squared_in_parts(p.local) / p.copies)
        elif p.local.numel():
            small.setdefault(p.copies, []).append(p.local)
    for copies, tensors in small.items():
        # Of bf16 in fp32: its own norm would be rounded to bf16.
        dtype = torch.float32 if tensors[0].dtype == torch.bfloat16 else None
        squares.append(torch.stack(torch._foreach_norm(tensors, 2, dtype)).double().square().sum() / copies)
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def _squared_in_parts(tensor: Tensor) -> Tensor:
    """Squared norm, each PART of it in the tensor's precision and their sum in fp64."""
    flat = tensor.flatten()
    if flat.dtype == torch.bfloat16:
        flat = flat.float()
    even = flat.numel() // PART * PART
    parts = torch.linalg.vector_norm(flat[:even].view(-1, PART), dim=1)
    return parts.double().square().sum() + torch.linalg.vector_norm(flat[even:]).double().square()
