"""Collectives and messages of this rank, by mesh axis; over real process groups or fake ones.

payload_bytes: the larger of a call's input and output on this rank. sent_bytes: what this rank sends in a ring of n
ranks: (n-1)/n of an all-gather's output or a reduce-scatter's input, twice that of an all-reduce; all of a message that
it sends, nothing of one that it receives.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import GroupName
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minka.parallel.mesh import MESH_AXES, Mesh

PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
# By the beginning of an operator's name without underscores; the first that fits counts.
KINDS = "all_reduce all_gather reduce_scatter all_to_all broadcast reduce gather scatter send".split()
COLLECTIVES = {kind.replace("_", ""): kind for kind in KINDS} | {"recv": "receive"}
ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}  # of (n-1)/n of the payload
SENT = {"send": 1.0, "receive": 0.0}  # of the payload; 1.0 for kinds that are in neither table


class Transfer(NamedTuple):
    """One kind of call. `axis` is one of MESH_AXES, "context", or "all" for a group that is not an axis."""

    kind: str
    axis: str
    dtype: str
    ranks: int


class Traffic(TorchDispatchMode):
    """While entered, counts `calls` and `payload_bytes` by Transfer. Barriers move no bytes."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._axes: dict[GroupName, str] = {}  # a group of all ranks belongs to the axis that is cut
        if mesh.axes is not None:
            cut = [axis for axis in MESH_AXES if mesh.axes[axis].size() > 1]
            self._axes = {mesh.axes.get_group(axis).group_name: axis for axis in cut}
        if mesh.context is not None:
            self._axes[mesh.context.group_name] = "context"
        self.calls: Counter[Transfer] = Counter()
        self.payload_bytes: Counter[Transfer] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not all(kind in PLAIN for kind in types):
            return NotImplemented  # a DTensor: its operations on local tensors come here again
        found = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func._schema.name.split("::")[1].replace("_", ""), [*args, *(kwargs or {}).values()], found)
        return found

    def _count(self, name: str, args: Sequence[Any], found: Any) -> None:
        kind = next((kind for prefix, kind in COLLECTIVES.items() if name.startswith(prefix)), "")
        group = next((group for group in map(_group, args) if group), None)
        if not kind or group is None:
            return
        tensors = [[leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in (*args, found)]
        sizes = [sum(tensor.nbytes for tensor in part) for part in tensors]
        dtype = next(str(part[0].dtype).removeprefix("torch.") for part in tensors if part)
        axis, ranks = self._axes.get(group.group_name, "all"), group.size()
        transfer = Transfer(kind, axis, dtype, ranks)
        self.calls[transfer] += 1
        self.payload_bytes[transfer] += max(sizes)


def sent_bytes(transfer: Transfer, payload: int) -> int:
    """Return what this rank sends of a payload (the top of this file)."""
    if transfer.kind in ROUNDS:
        return round(ROUNDS[transfer.kind] * payload * (transfer.ranks - 1) / transfer.ranks)
    return round(SENT.get(transfer.kind, 1.0) * payload)


def _group(argument: Any) -> Any:
    """Return the process group that an operator's argument is or names; None for other arguments."""
    if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith("c10d.ProcessGroup"):
        return dist.ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        try:
            return torch._C._distributed_c10d._resolve_process_group(GroupName(argument))
        except (RuntimeError, ValueError):
            return None  # "sum" and other strings
    return None
