"""Where ZeRO keeps a parameter: a range of the flattened parameter in a flat fp32 partition, and that range as boxes.

Stages 1 and 2 concatenate all parameters of a group and cut the result, so a rank may hold nothing of a parameter;
stage 3 cuts each parameter. A cut falls anywhere within a row of a matrix. All tensors returned are views.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, numbered


class Box(NamedTuple):
    """Elements [first, last) of a range, which are the box of `size` at `offset` of the whole tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    first: int
    last: int


class Slice(NamedTuple):
    """This rank's elements [first, last) of a flattened parameter: partition[at : at + last - first] of a partition."""

    name: str
    parameter: Any  # has attributes that DeepSpeed sets
    shape: tuple[int, ...]  # of the whole parameter
    first: int
    last: int
    partition: Tensor  # the fp32 master weights around it, 1-D
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """The slice's elements of `flat`, a tensor laid out as the partition; a view."""
        return flat.detach().narrow(0, self.at, self.last - self.first)

    def flat_piece(self, local: Tensor) -> Piece:
        """`local`, 1-D, as a box of the flattened parameter: for norms, not for checkpoints."""
        return Piece(local, (self.first,), (math.prod(self.shape),))

    def pieces(self, kind: str, flat: Tensor) -> dict[str, Piece]:
        """The slice's elements of `flat` as boxes of the whole tensor KIND.NAME; one empty box where there are none."""
        elements, found = self.of(flat), {}
        for number, box in enumerate(boxes(self.shape, self.first, self.last)):
            local = elements[box.first : box.last].view(box.size)
            found[numbered(f"{kind}.{self.name}", number)] = Piece(local, box.offset, self.shape)
        return found


def boxes(shape: tuple[int, ...], first: int, last: int) -> list[Box]:
    """Elements [first, last) of a flattened tensor as boxes, in their order; one empty box when there are none.

    At most 2 * dimensions - 1: the end of a row, whole rows, the beginning of a row.
    """
    if first == last:
        return [Box((0,) * len(shape), (0,) * len(shape), 0, 0)]
    if len(shape) == 1:
        return [Box((first,), (last - first,), 0, last - first)]
    row = math.prod(shape[1:])
    found, at = [], first
    while at < last:
        index, within = divmod(at, row)
        whole = (last - at) // row
        if within == 0 and whole:
            end = at + whole * row
            zeros = (0,) * (len(shape) - 1)
            found.append(Box((index, *zeros), (whole, *shape[1:]), at - first, end - first))
        else:
            end = min(last, (index + 1) * row)
            for box in boxes(shape[1:], within, within + end - at):
                begin = at - first
                found.append(Box((index, *box.offset), (1, *box.size), begin + box.first, begin + box.last))
        at = end
    return found


def partitions(zero: Any, adamw: torch.optim.AdamW) -> list[Tensor]:
    """This rank's flat fp32 partitions, `zero` being DeepSpeed's optimizer: what the inner optimizer steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: the inner optimizer gets one at a time
        found: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        return found
    return [group["params"][0] for group in adamw.param_groups]


def slices(zero: Any, adamw: torch.optim.AdamW, named: Callable[[], Any], mesh: Mesh) -> list[Slice]:
    """This rank's slice of every parameter, the same names in the same order on all ranks."""
    flats = partitions(zero, adamw)
    found = []
    for name, parameter in named():
        if hasattr(parameter, "ds_id"):
            group, at, _ = zero.grad_position[zero.get_param_id(parameter)]
            count, part = parameter.ds_numel, parameter.partition_numel()
            first = min(mesh.rank * part, count)
            last = min(first + part, count)
            found.append(Slice(name, parameter, tuple(parameter.ds_shape), first, last, flats[group], int(at)))
            continue
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping
        if mapping is None:
            found.append(Slice(name, parameter, shape, 0, 0, flats[0], 0))
            continue
        first, count = int(mapping.lp_fragment_address.start), int(mapping.lp_fragment_address.numel)
        flat, at = flats[mapping.param_group_index], int(mapping.hp_fragment_address.start)
        found.append(Slice(name, parameter, shape, first, first + count, flat, at))
    return found


def gradient_of(zero: Any, part: Slice) -> Tensor:
    """The reduced gradient of a slice, fp32 and 1-D, between backward and step."""
    count = part.last - part.first
    if hasattr(part.parameter, "ds_id"):
        local: Tensor = zero.get_local_fp32_grad_for_param(part.parameter)
        return local.narrow(0, 0, count)
    mapping: Any = part.parameter._hp_mapping
    if mapping is None:
        return part.partition.new_zeros(0)
    gradient: Tensor = mapping.get_lp_grad_fragment(part.parameter._index_in_param_group).flatten()
    if gradient.numel() != count:  # of the whole parameter, in bf16 under stage 1
        gradient = gradient.narrow(0, part.first, count)
    return gradient.float()
