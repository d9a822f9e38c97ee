"""Memory of this rank by kind, traced at each operation; with real tensors or fake ones.

A storage counts once, however many views it has, with the bytes it was asked for: no rounding, no caching, and nothing
that a kernel allocates and frees inside one operation. Its kind is often known only later (a product becomes a
gradient, a sum is saved for backward), so allocations and deallocations are logged, and added up at the end.

Where a storage could be of two kinds, the first in RANKED wins: keys and values that were gathered and are saved for
backward are "gathered".
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup  # there is no public hook
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minka.kernels import linear_cross_entropy
from minka.plan.memory_kinds import MEMORY_KINDS

RANKED = ("weights", "optimizer", "gradients", "logits", "gathered", "activations", "workspace")
FSDP_SCOPES = {"unshard": "gathered", "wait_for_unshard": "gathered", "post_backward": "gradients"}
GATHERS = ("c10d::_allgather_base_", "c10d::allgather_", "_c10d_functional::all_gather_into_tensor")
COPIES = ("aten::cat", "aten::clone", "aten::index")  # of something gathered: still gathered
WAIT = "_c10d_functional::wait_tensor"
DTENSOR_PLANS = ("_propagate_tensor_meta_non_cached", "propagate_op_sharding_non_cached")
ACCUMULATE = "torch::autograd::AccumulateGrad"
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


class Peak(NamedTuple):
    """Bytes. `by_kind` is at the moment when the total was largest, `largest` each kind's own maximum."""

    total: int
    by_kind: dict[str, int]
    largest: dict[str, int]


class MemoryTrace(TorchDispatchMode):
    """While entered, sees every storage that an operation makes. Enter it inside a FakeTensorMode.

    `watch` adds tensors that existed before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kind: list[str] = []  # of each storage so far
        self._log: list[tuple[int, int]] = []  # (storage, its bytes from now on)
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address: (storage, reference)
        self._scopes: list[Callable[[Tensor], str] | None] = []  # None: what is made is not counted
        self._patches = ExitStack()

    def watch(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of these tensors, and count them from now on if they were not counted."""
        for tensor in tensors:
            for part in plain_tensors(tensor):
                number = self._number(part)
                self._kind[number] = min(self._kind[number], kind, key=RANKED.index)

    def peak(self) -> Peak:
        """Return the peak since the trace began."""
        now, bytes_of = dict.fromkeys(MEMORY_KINDS, 0), [0] * len(self._kind)
        top, at_top, largest, total = 0, dict(now), dict(now), 0
        for number, size in self._log:
            kind, change = self._kind[number], size - bytes_of[number]
            bytes_of[number] = size
            now[kind] += change
            total += change
            largest[kind] = max(largest[kind], now[kind])
            if total > top:
                top, at_top = total, dict(now)
        return Peak(top, at_top, largest)

    def __enter__(self) -> "MemoryTrace":
        self._wrap(saved_tensors_hooks, "__init__", self._save)
        for name, kind in FSDP_SCOPES.items():
            self._wrap(FSDPParamGroup, name, partial(self._run_fsdp, kind))
        self._wrap(linear_cross_entropy, "_chunked", self._compute_loss)
        for name in DTENSOR_PLANS:
            self._wrap(ShardingPropagator, name, self._plan)
        self._wrap(torch.UntypedStorage, "resize_", self._resize)
        self._wrap(checkpointing._VersionWrapper, "__init__", self._keep)
        # Detached: a node that saves its own output would keep itself alive, after a split backward forever.
        self._patches.enter_context(saved_tensors_hooks(Tensor.detach, lambda x: x))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not all(kind in PLAIN for kind in types):
            return NotImplemented  # a DTensor: its operations on local tensors come here again
        name = func._schema.name
        if self._scopes and self._scopes[-1] is None:
            return func(*args, **(kwargs or {}))
        if name == WAIT and isinstance(args[0], FakeTensor):
            return args[0]  # as with real tensors; a fake one would come back as a different tensor
        found = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if not func.is_view:  # an unknown view is of a buffer that gloo keeps
            for tensor in made:
                self._number(tensor)
        if name.startswith(GATHERS):
            self.watch("gathered", list(tree_leaves(args[0] if "c10d::" in name else found)))
        elif name in COPIES:
            source = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
            known = None if source is None else self._alive.get(source.untyped_storage()._cdata)
            if known is not None and self._kind[known[0]] == "gathered":
                self.watch("gathered", made)
        node: Any = torch._C._current_autograd_node()
        if node is not None and node.name() == ACCUMULATE and isinstance(node.variable, torch.nn.Parameter):
            self.watch("gradients", made)
        return found

    def _number(self, tensor: Tensor) -> int:
        """Return the number of the tensor's storage; a new one has the kind of the current scope."""
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None:
            return known[0]
        kind_of = self._scopes[-1] if self._scopes else None
        return self._add(storage, kind_of(tensor) if kind_of else "workspace")

    def _add(self, storage: torch.UntypedStorage, kind: str) -> int:
        number, address = len(self._kind), storage._cdata
        self._kind.append(kind)

        def freed(_: object, alive: Any = self._alive, log: Any = self._log) -> None:
            del alive[address]
            log.append((number, 0))

        self._alive[address] = number, weakref.ref(storage, freed)
        self._log.append((number, storage.nbytes()))
        return number

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Until the end of the trace, call `around` in place of `owner.name`, with that and its arguments."""
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs)

        self._patches.enter_context(patch.object(owner, name, outer))

    @contextmanager
    def _scope(self, kind_of: Callable[[Tensor], str] | None) -> Iterator[None]:
        self._scopes.append(kind_of)
        try:
            yield
        finally:
            self._scopes.pop()

    def _resize(self, inner: Any, storage: torch.UntypedStorage, size: int) -> Any:
        """FSDP frees whole weights by resizing their storage to 0, and resizes it back."""
        found = inner(storage, size)
        known = self._alive.get(storage._cdata)
        if known is None:
            self._add(storage, "gathered")
        else:
            self._log.append((known[0], storage.nbytes()))
        return found

    def _save(self, inner: Any, hooks: Any, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        """Watch what is saved by autograd itself and by recomputation, which has its own hooks."""

        def watched(x: Any) -> Any:
            try:
                kept = pack(x)
            except Exception:  # recomputation ends with this after its last saved tensor
                self.watch("activations", [x])
                raise
            if isinstance(kept, Tensor):
                self.watch("activations", [kept])
            return kept

        inner(hooks, watched, unpack)

    def _keep(self, inner: Any, wrapper: Any, value: Any) -> None:
        """Watch what selective recomputation keeps."""
        if isinstance(value, Tensor):
            self.watch("activations", [value])
        inner(wrapper, value)

    def _run_fsdp(self, kind: str, inner: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        """Whole gradients are known before FSDP reduces them; what it makes is of one kind."""
        if kind == "gradients":
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                gradients = [None if whole is None else whole.grad, parameter.unsharded_accumulated_grad]
                self.watch(kind, [gradient for gradient in gradients if gradient is not None])
        with self._scope(lambda _: kind):
            return inner(group, *args, **kwargs)

    def _plan(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """DTensor plans an operation on fakes of global shapes."""
        with self._scope(None):
            return inner(*args, **kwargs)

    def _compute_loss(self, inner: Any, hidden_ND: Tensor, weight_VD: Tensor, *args: Any) -> Any:
        """A chunk's logits are known by shape, the gradients by being returned."""
        whole, vocab = tuple(weight_VD.shape), weight_VD.shape[0]

        def kind_of(made: Tensor) -> str:
            shape = tuple(made.shape)
            return "logits" if shape != whole and shape[-1:] == (vocab,) else "workspace"

        with self._scope(kind_of):
            found = inner(hidden_ND, weight_VD, *args)
        self.watch("gradients", [tensor for tensor in found[1:] if tensor is not None])
        return found


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a tensor's numbers: itself, or those inside a DTensor, next to its mesh."""
    if type(tensor) in PLAIN or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for part in parts if isinstance(part, Tensor) for plain in plain_tensors(part)]
