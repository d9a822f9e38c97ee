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
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup  # there is no public hook
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minka.kernels import linear_cross_entropy
from minka.plan.memory import MEMORY_KINDS

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
        self._kind: list[int] = []  # of each storage so far: an index of RANKED
        self._log: list[tuple[int, int]] = []  # (storage, its bytes from now on)
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address: (storage, reference)
        self._scopes: list[Callable[[Tensor], str]] = []
        self._planning = 0  # depth in DTensor's planning of an operation, on fakes of global shapes
        self._patches = ExitStack()

    def watch(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of these tensors, and count them from now on if they were not counted."""
        wanted = RANKED.index(kind)
        for tensor in tensors:
            for part in flat(tensor):
                number = self._number(part)
                self._kind[number] = min(self._kind[number], wanted)

    def peak(self) -> Peak:
        """Return the peak since the trace began."""
        now, bytes_of = [0] * len(RANKED), [0] * len(self._kind)
        top, at_top, largest, total = 0, list(now), list(now), 0
        for number, size in self._log:
            kind, change = self._kind[number], size - bytes_of[number]
            bytes_of[number] = size
            now[kind] += change
            total += change
            largest[kind] = max(largest[kind], now[kind])
            if total > top:
                top, at_top = total, list(now)
        return Peak(top, _named(at_top), _named(largest))

    def __enter__(self) -> "MemoryTrace":
        self._patches.enter_context(self._saved_tensors_watched())
        for name, kind in FSDP_SCOPES.items():
            self._patches.enter_context(self._scoped(FSDPParamGroup, name, kind))
        self._patches.enter_context(patch.object(linear_cross_entropy, "_chunked", self._chunked()))
        for name in DTENSOR_PLANS:
            self._patches.enter_context(self._ignored(ShardingPropagator, name))
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resizing()))
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
        if self._planning:
            return func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == WAIT and isinstance(args[0], FakeTensor):
            return args[0]  # as with real tensors; a fake one would come back as a different tensor
        found = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if not func.is_view:  # an unknown view is of a buffer that gloo keeps
            for tensor in made:
                self._number(tensor)
        if name.startswith(GATHERS):
            self.watch("gathered", list(tree_leaves(args[0] if "c10d::" in name else found)))
        elif name in COPIES and self._is_gathered(tree_leaves(args)):
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
        return self._add(storage, self._scopes[-1](tensor) if self._scopes else "workspace")

    def _add(self, storage: torch.UntypedStorage, kind: str) -> int:
        number, address = len(self._kind), storage._cdata
        self._kind.append(RANKED.index(kind))

        def freed(_: object, alive: Any = self._alive, log: Any = self._log) -> None:
            del alive[address]
            log.append((number, 0))

        self._alive[address] = number, weakref.ref(storage, freed)
        self._log.append((number, storage.nbytes()))
        return number

    def _is_gathered(self, leaves: Sequence[Any]) -> bool:
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        known = None if first is None else self._alive.get(first.untyped_storage()._cdata)
        return known is not None and self._kind[known[0]] == RANKED.index("gathered")

    def _resizing(self) -> Callable[..., Any]:
        """FSDP frees whole weights by resizing their storage to 0, and resizes it back."""
        resize, trace = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            known = trace._alive.get(storage._cdata)
            if known is None:
                trace._add(storage, "gathered")
            else:
                trace._log.append((known[0], storage.nbytes()))
            return found

        return resized

    @contextmanager
    def _saved_tensors_watched(self) -> Iterator[None]:
        """Watch what is saved by autograd itself and by recomputation, which has its own hooks."""
        init, trace = saved_tensors_hooks.__init__, self

        def watching(hooks: Any, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
            def watched(x: Any) -> Any:
                try:
                    kept = pack(x)
                except Exception:  # recomputation ends with this after its last saved tensor
                    trace.watch("activations", [x])
                    raise
                if isinstance(kept, Tensor):
                    trace.watch("activations", [kept])
                return kept

            init(hooks, watched, unpack)

        # Detached: a node that saves its own output would keep itself alive, after a split backward forever.
        with patch.object(saved_tensors_hooks, "__init__", watching), saved_tensors_hooks(Tensor.detach, lambda x: x):
            yield

    @contextmanager
    def _scope(self, kind_of: Callable[[Tensor], str]) -> Iterator[None]:
        self._scopes.append(kind_of)
        try:
            yield
        finally:
            self._scopes.pop()

    def _scoped(self, owner: type, name: str, kind: str) -> Any:
        """Patch `owner.name` so that storages made in it are of a kind."""
        inner, trace = getattr(owner, name), self

        def outer(group: Any, *args: Any, **kwargs: Any) -> Any:
            if kind == "gradients":
                trace.watch(kind, _whole_gradients(group))
            with trace._scope(lambda _: kind):
                return inner(group, *args, **kwargs)

        return patch.object(owner, name, outer)

    def _ignored(self, owner: type, name: str) -> Any:
        """Patch `owner.name` so that tensors made in it are not counted."""
        inner, trace = getattr(owner, name), self

        def outer(*args: Any, **kwargs: Any) -> Any:
            trace._planning += 1
            try:
                return inner(*args, **kwargs)
            finally:
                trace._planning -= 1

        return patch.object(owner, name, outer)

    def _chunked(self) -> Callable[..., Any]:
        """The loss: a chunk's logits are known by shape, the gradients by being returned."""
        inner, trace = linear_cross_entropy._chunked, self

        def outer(hidden_ND: Tensor, weight_VD: Tensor, *args: Any) -> Any:
            whole, vocab = tuple(weight_VD.shape), weight_VD.shape[0]

            def kind_of(made: Tensor) -> str:
                shape = tuple(made.shape)
                return "logits" if shape != whole and shape[-1:] == (vocab,) else "workspace"

            with trace._scope(kind_of):
                found = inner(hidden_ND, weight_VD, *args)
            trace.watch("gradients", [tensor for tensor in found[3:] if tensor is not None])
            return found

        return outer


def flat(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that hold a tensor's numbers: itself, or those inside a DTensor."""
    if type(tensor) in PLAIN or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    for part in parts:
        if isinstance(part, Tensor):  # a DTensor's mesh is among them
            yield from flat(part)


def _whole_gradients(group: Any) -> list[Tensor]:
    """Return the whole gradients of a group of FSDP's parameters that is about to reduce them."""
    found = []
    for parameter in group.fsdp_params:
        whole = getattr(parameter, "_unsharded_param", None)
        found += [whole.grad if whole is not None else None, parameter.unsharded_accumulated_grad]
    return [gradient for gradient in found if gradient is not None]


def _named(numbers: Sequence[int]) -> dict[str, int]:
    by_kind = dict(zip(RANKED, numbers, strict=True))
    return {kind: by_kind[kind] for kind in MEMORY_KINDS}
