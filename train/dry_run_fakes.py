"""Replacements for the numbers, the peers and the GPU that a dry run does not have."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining import schedules
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from minka.data.batch import Batch
from minka.model.attention import map_tensors
from minka.parallel.inputs import InputCutter, ModelInputs
from minka.parallel.traffic import Traffic, Transfer
from minka.plan.config import RunConfig


@dataclass(frozen=True)
class NotedInputs(ModelInputs):
    """Inputs that call `note` when the model takes them."""

    note: Callable[[], None] = lambda: None

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelInputs:
        self.note()
        return super().to(device, dtype)


class AssumedInputs:
    """Micro-batches whose numbers are never looked at: a row is one document to varlen kernels, and two to a mask."""

    def __init__(self, config: RunConfig, cutter: InputCutter) -> None:
        self.shape, self.cutter = (config.layout.micro_batch, config.data.seq_len), cutter
        self._traffic: Traffic | None = None
        self._before: list[tuple[Counter[Transfer], Counter[Transfer]]] = []

    def make(self, mode: FakeTensorMode) -> NotedInputs:
        """A micro-batch of fake tensors."""
        with unset_fake_temporarily():
            zeros = torch.zeros(self.shape, dtype=torch.int64)
            documents = zeros.clone()
            if not self.cutter.varlen:
                documents[:, self.shape[1] // 2 :] = 1
            batch = Batch(zeros, zeros.clone(), documents, zeros.clone(), zeros[:, 0], zeros.numel())
            real = self.cutter.prepare(batch)
        inputs: ModelInputs = map_tensors(real, mode.from_tensor)
        return NotedInputs(inputs.tokens, inputs.positions, inputs.structure, inputs.targets, self._note)

    def watch(self, traffic: Traffic) -> None:
        """Note what has been sent when each micro-batch starts."""
        self._traffic, self._before = traffic, []

    def middle(self) -> tuple[Counter[Transfer], Counter[Transfer]]:
        """Calls and bytes that a micro-batch sends that is neither the first nor the last."""
        (calls, payload), (calls_after, payload_after) = self._before[1:3]
        return calls_after - calls, payload_after - payload

    def _note(self) -> None:
        if self._traffic is not None:
            self._before.append((Counter(self._traffic.calls), Counter(self._traffic.payload_bytes)))


def tensors_in(inputs: ModelInputs) -> list[Tensor]:
    """All tensors of a micro-batch's inputs."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(inputs, add)
    return found


@contextmanager
def alone(world: int, rank: int) -> Iterator[None]:
    """Be rank `rank` of a process group whose collectives and messages do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # the group names of an equal mesh differ between ranks
        gc.collect()


class _Held:
    """A message that keeps its tensors until it is waited for, as with gloo and NCCL; a fake group's does not."""

    def __init__(self, work: Any, tensors: list[Tensor]) -> None:
        self._work, self._tensors = work, tensors

    def wait(self) -> None:
        self._work.wait()
        self._tensors = []


@contextmanager
def without_numbers() -> Iterator[None]:
    """Replace parts of torch that read numbers or addresses, which fake tensors do not have, or that hold messages."""
    send = schedules._batch_p2p

    def hold(ops: list[Any], desc: str | None = None) -> list[_Held]:
        return [_Held(work, [op.tensor for op in ops]) for work in send(ops, desc)]

    def warm_up(_: Any, stages: Sequence[Any], *rest: Any) -> None:
        for stage in stages:
            stage._inference_mode = schedules.InferenceMode.STATIC  # type: ignore[attr-defined]  # what ranks agree on where all know their shapes

    with ExitStack() as stack:
        # It tells by address whether a shard is padded already, and would pad it twice, next to the optimizer's copy.
        stack.enter_context(patch.object(FSDPParam, "reset_sharded_param", lambda _: None))
        if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):  # torch 2.11 has none: its ranks agree on nothing
            stack.enter_context(patch.object(schedules._PipelineSchedule, "_warmup_p2p", warm_up))
        stack.enter_context(patch.object(schedules, "_batch_p2p", hold))
        yield
