"""No training step reads the device from the host, or waits for it: shown with meta tensors as the device.

The real loop runs on a real loader's batches; weights, gradients and losses are on torch's meta device, in bf16 with
variable-length attention. A meta tensor has no numbers: `item`, `tolist`, `nonzero`, `cpu` and operations on mixed
devices raise. Copies to it that a GPU would make the host wait for are refused here. Other ranks are torch's fake
process group.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch.distributed.fsdp._fully_shard import (
    _fsdp_collectives,
    _fsdp_param_group,
    _fsdp_state,
    _fully_shard,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minka.data.loader import Loader
from minka.data.prepare import open_or_prepare
from minka.kernels import linear_cross_entropy
from minka.model import attention
from minka.parallel import engine as engine_module
from minka.parallel.apply import cut
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.mesh import lay_mesh
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.train import loop
from minka.train.build_engine import engine_over
from minka.train.dry_run_fakes import alone, without_numbers
from minka.train.loop import Session, TrainingEnd, train
from minka.train.metrics import Metrics
from minka.train.state import State
from tiny import tiny

META, STEPS = torch.device("meta"), 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "shard 2, reduced in each micro-batch": {"shard": 2, "reduce": "micro_batch"},
    "replicate 2 x shard 2, recomputed": {"replicate": 2, "shard": 2, "recompute": "block"},
    "bf16 weights and moments": {"weights": "bf16", "moments": "bf16"},
    "tensor 2": {"tensor": 2},
    "context 2": {"context": 2},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2, zbv, x shard 2 x context 2 x tensor 2": {
        "pipeline": 2,
        "schedule": "zbv",
        "shard": 2,
        "context": 2,
        "tensor": 2,
    },
}


class HostWait(RuntimeError):
    """The host would wait for a copy to the device."""


class NoBlockingCopies(TorchDispatchMode):
    """Refuses copies from the host to the device that are not `non_blocking`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            crosses = args[0].device.type == "cpu" and torch.device(kwargs.get("device") or "cpu").type == "meta"
            if crosses and not kwargs.get("non_blocking"):
                raise HostWait("a blocking copy from the host to the device")
        if func is torch.ops.aten.copy_.default and {x.device.type for x in args[:2]} == {"cpu", "meta"}:
            raise HostWait("a copy between the host and the device")
        return func(*args, **kwargs)


class NoListsToDevice(TorchFunctionMode):
    """Refuses device tensors made of Python numbers, which torch copies from the host and waits for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            raise HostWait("a device tensor of Python numbers")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store."""
    return tmp_path_factory.mktemp("meta")


OFTEN = ("one rank", "bf16 weights and moments", "pipeline 2, zbv, x shard 2 x context 2 x tensor 2")


def rows() -> list[Any]:
    """Layouts with each implementation; torch's own operations under three of them in every run of the tests."""
    every = [(layout, how) for how in ("torch", "triton") for layout in LAYOUTS]
    marks = [[] if how == "triton" or layout in OFTEN else [pytest.mark.slow] for layout, how in every]
    return [pytest.param(*row, marks=mark) for row, mark in zip(every, marks, strict=True)]


@pytest.mark.parametrize("rank", ["first", "last"])
@pytest.mark.parametrize(("layout", "implementation"), rows())
def test_a_step_never_reads_the_device_from_the_host(layout: str, rank: str, implementation: str, folder: Path) -> None:
    """With Triton's kernels their operators run, whose results on meta tensors have no numbers."""
    config = config_of(folder, LAYOUTS[layout], implementation)
    state, status, *_ = run_on_meta(config, 0 if rank == "first" else config.layout.world - 1)
    assert (state.step, status) == (STEPS, ExitStatus.DONE)


def item_in_the_verdict() -> Any:
    right: Any = vars(loop)["accepts"]
    return patch.object(loop, "accepts", lambda sums, norm: torch.tensor(bool(right(sums, norm).item())))


def cpu_in_the_norm() -> Any:
    right: Any = vars(engine_module)["squared_norm"]
    return patch.object(engine_module, "squared_norm", lambda pieces: right(pieces).cpu().to(META))


def tolist_in_the_record() -> Any:
    right = Metrics.note

    def note(self: Metrics, state: State, sums: Any, *rest: Any) -> None:
        sums.loss.tolist()
        right(self, state, sums, *rest)

    return patch.object(Metrics, "note", note)


def nonzero_in_attention() -> Any:
    return before(attention, "_varlen", lambda q, k, v, structure: structure.starts.diff().nonzero())


def branch_in_the_loss() -> Any:
    return before(linear_cross_entropy, "_chunked", lambda hidden, weight, targets, *rest: bool((targets > 0).any()))


def host_ids_in_attention() -> Any:
    return before(attention, "_varlen", lambda q, k, v, structure: structure.documents.flatten()[:1] * q)


def blocking_copy_of_tokens() -> Any:
    return before(ModelInputs, "to", lambda self, device, dtype: self.tokens.to(device))


def tensor_from_a_list() -> Any:
    return before(engine_module, "squared_norm", lambda pieces: torch.tensor([1.0], device=META))


def before(owner: Any, name: str, plant: Callable[..., object]) -> Any:
    """Patch a function so that `plant` is called with its arguments first."""
    right = getattr(owner, name)

    def planted(*args: Any, **options: Any) -> Any:
        plant(*args, **options)
        return right(*args, **options)

    return patch.object(owner, name, planted)


@pytest.mark.parametrize(
    "plant",
    [
        item_in_the_verdict,
        cpu_in_the_norm,
        tolist_in_the_record,
        nonzero_in_attention,
        branch_in_the_loss,
        host_ids_in_attention,
        blocking_copy_of_tokens,
        tensor_from_a_list,
    ],
)
def test_a_planted_synchronisation_is_seen(plant: Callable[[], Any], folder: Path) -> None:
    config = config_of(folder, LAYOUTS["context 2" if plant is nonzero_in_attention else "one rank"])
    with plant(), pytest.raises((RuntimeError, NotImplementedError), match=r"meta|device"):
        run_on_meta(config, 0)


def config_of(folder: Path, layout: dict[str, Any], implementation: str = "torch") -> RunConfig:
    """A run in bf16 with accumulation, batch warm-up and padding."""
    model = {"layers": 4, "tied": False, "qk_norm": True}
    run = {"max_steps": STEPS, "name": "meta"}
    stored: dict[str, Any] = {key: layout[key] for key in ("weights", "moments") if key in layout}
    settings: dict[str, Any] = {"shard": 1, "micro_batch": 1, "precision": "bf16", **layout}
    kept = {key: value for key, value in settings.items() if key not in stored}
    kernels: dict[str, Any] = {
        "implementation": implementation,
        "attention": "auto" if implementation == "torch" else "triton",
    }
    optimizer: dict[str, Any] = {"learning_rate": 3e-3, "max_norm": 0.5, **stored}
    sections: dict[str, Any] = {
        "layout": kept,
        "schedule": {"warmup": 1},
        "kernels": kernels,
        "optimizer": optimizer,
    }
    return tiny(folder, run=run, model=model, **sections)


def run_on_meta(config: RunConfig, rank: int) -> TrainingEnd:
    """The real loop with meta tensors for what is on the device, and with nothing around it that records."""
    store = open_or_prepare(config, Path())
    with alone(config.layout.world, rank), meta_in_torch(), without_numbers():
        mesh = replace(lay_mesh(config.layout, torch.device("cpu"), rank), device=META)
        kernels = kernels_of(config, mesh, as_gpu=True)
        triton = config.kernels.implementation == "triton"
        assert set(kernels.ways().values()) == ({"triton"} if triton else {"torch", "aten", "varlen"})
        parts = cut(config, mesh, kernels)
        for part in parts:
            part.to_empty(device=META)
        engine, optimizer = engine_over(parts, InputCutter.over(mesh, kernels), config)
        record, supervisor = MagicMock(), MagicMock()
        record.judge.side_effect = lambda metrics, state: accept(record, state)
        supervisor.stop_requested.return_value = False
        loader = Loader(config, store.split("train"), mesh.data_rank, config.layout.data_ways, None, engine.prepare)
        with loader, NoBlockingCopies(), NoListsToDevice():
            session = Session(config, mesh, engine, optimizer, loader, record, supervisor, MagicMock(), False)
            return train(session, State())


def accept(record: MagicMock, state: State) -> tuple[State, ExitStatus]:
    record.accepted = state
    return state, ExitStatus.DONE


@contextmanager
def meta_in_torch() -> Iterator[None]:
    """Streams and events of the CPU for the meta device, which has none, and messages of a pipeline that go nowhere."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(_fully_shard, "_get_device_from_mesh", lambda mesh: META))
        for module in (_fsdp_collectives, _fsdp_param_group, _fsdp_state):
            stack.enter_context(patch.object(module, "_get_device_handle", lambda kind: torch.cpu))
        stack.enter_context(patch.object(torch.cpu.Stream, "record_event", lambda *_: torch.cpu.Event()))
        stack.enter_context(patch.object(torch.distributed, "batch_isend_irecv", lambda messages: []))
        group = _fsdp_param_group.FSDPParamGroup
        stack.enter_context(patch.object(group, "_validate_no_meta_params", lambda self: None))
        yield
