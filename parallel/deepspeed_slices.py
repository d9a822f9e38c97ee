"""Where ZeRO keeps a parameter: a range of the flattened parameter in a flat fp32 partition, and that range as boxes.

Stages 1 and 2 concatenate all parameters of a group and cut the result, so a rank may hold nothing of a parameter;
stage 3 cuts each parameter. A cut falls anywhere within a row of a matrix. All tensors returned are views.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece

Box = tuple[tuple[int, ...], tuple[int, ...]]  # its offset in the whole tensor, and its size


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

    def pieces(self, kind: str, flat: Tensor) -> dict[str, Piece]:
        """The slice's elements of `flat` as boxes of the whole tensor KIND.NAME; one empty box where there are none."""
        found, cut = {}, boxes(self.shape, self.first, self.last)
        parts = self.of(flat).split([math.prod(size) for _, size in cut])
        for number, (local, (offset, size)) in enumerate(zip(parts, cut, strict=True)):
            key = f"{kind}.{self.name}#{number}" if number else f"{kind}.{self.name}"
            found[key] = Piece(local.view(size), offset, self.shape)
        return found


def boxes(shape: tuple[int, ...], first: int, last: int) -> list[Box]:
    """Elements [first, last) of a flattened tensor as boxes, in their order; one empty box when there are none.

    At most 2 * dimensions - 1: the end of a row, whole rows, the beginning of a row.
    """
    if first == last:
        return [((0,) * len(shape), (0,) * len(shape))]
    if len(shape) == 1:
        return [((first,), (last - first,))]
    row, zeros = math.prod(shape[1:]), (0,) * (len(shape) - 1)
    found, at = [], first
    while at < last:
        index, within = divmod(at, row)
        whole = (last - at) // row
        if within == 0 and whole:
            found.append(((index, *zeros), (whole, *shape[1:])))
            at += whole * row
        else:
            end = min(last, (index + 1) * row)
            inner = boxes(shape[1:], within, within + end - at)
            found += [((index, *offset), (1, *size)) for offset, size in inner]
            at = end
    return found


def slices(zero: Any, partitions: Sequence[Tensor], model: Any, mesh: Mesh) -> list[Slice]:
    """This rank's slice of every parameter, the same names in the same order on all ranks.

    zero: DeepSpeed's optimizer. partitions: this rank's flat fp32 ones.
    """
    found = []
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            shape, count, part = tuple(parameter.ds_shape), parameter.ds_numel, parameter.partition_numel()
            group, at, _ = zero.grad_position[zero.get_param_id(parameter)]
            first = min(mesh.rank * part, count)
            last = min(first + part, count)
        else:
            shape, mapping = tuple(parameter.shape), parameter._hp_mapping
            group = at = first = last = 0
            if mapping is not None:
                group, at = mapping.param_group_index, mapping.hp_fragment_address.start
                first = int(mapping.lp_fragment_address.start)
                last = first + int(mapping.lp_fragment_address.numel)
        found.append(Slice(name, parameter, shape, first, last, partitions[group], int(at)))
    return found


def gradient_of(zero: Any, part: Slice) -> Tensor:
    """The reduced gradient of a slice, fp32 and 1-D, between backward and step."""
    count = part.last - part.first
    if hasattr(part.parameter, "ds_id"):
        # Where it is: get_local_fp32_grad_for_param would copy an offloaded one back to the device.
        partition, _ = zero._get_fp32_grad_state_partition(part.parameter, release_swap_buffers=True)
        return partition.narrow(0, 0, count).float()
    mapping: Any = part.parameter._hp_mapping
    if mapping is None:
        return part.partition.new_zeros(0)
    gradient: Tensor = mapping.get_lp_grad_fragment(part.parameter._index_in_param_group).flatten()
    if gradient.numel() != count:  # of the whole parameter, in bf16 under stage 1
        gradient = gradient.narrow(0, part.first, count)
    return gradient.float()
