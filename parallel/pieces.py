"""A piece: the box of a global tensor that one rank holds. Checkpoints, initial weights and norms speak of pieces."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # no public form in 2.11 to 2.13


class Piece(NamedTuple):
    """`local` is the box of a tensor of `global_shape` that begins at `offset`.

    `copies` ranks hold the same box, and this one is number `copy` of them.
    """

    local: Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    copies: int = 1
    copy: int = 0


def piece_of(tensor: Tensor) -> Piece:
    """Where a parameter (plain or DTensor) lies in its global tensor."""
    if not isinstance(tensor, DTensor):
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        copies = 1 if alone else dist.get_world_size()
        return Piece(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape), copies, 0 if alone else dist.get_rank())
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    copies, copy = 1, 0
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every rank is on the mesh
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):  # not `not is_shard()`: a strided shard says it is none
            copies *= mesh.size(axis)
            copy = copy * mesh.size(axis) + coordinate[axis]
    return Piece(tensor.to_local().detach(), tuple(offset), tuple(tensor.shape), copies, copy)


def like(piece: Piece, local: Tensor) -> Piece:
    """The same box with another tensor in it: an optimizer moment beside its parameter."""
    return piece._replace(local=local)


def to_write(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """What this rank writes of its pieces: of each box one copy is written, and the copies share the work.

    Each box goes to the copy that has the least so far. Ranks agree without a word, since all of them go through the
    same names and global shapes in the same order.
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
    full = [p for p in pieces if p.local.numel()]
    if not full:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm([p.local for p in full]))
    shares = torch.tensor([1.0 / p.copies for p in full], dtype=torch.float64, device=norms.device)
    return (norms.double().square() * shares).sum()
