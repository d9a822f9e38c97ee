"""Replacements for the numbers, the peers and the GPU that a dry run does not have."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from minka.model import transformer
from minka.model.attention import ContextShard, Structure, additive, allowed_pairs
from minka.parallel import tensor as tensor_parallel
from minka.parallel.context import gather_over, gathered_places, places, varlen_part
from minka.parallel.inputs import Fed, Feeder
from minka.parallel.mesh import Mesh
from minka.parallel.traffic import Traffic, Transfer
from minka.plan.config import RunConfig
from minka.plan.sizing import attention_kind


class Fakes(NamedTuple):
    """A micro-batch of tensors [B, T]; their numbers are never looked at."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor


def fakes(config: RunConfig) -> Fakes:
    """A micro-batch, under a FakeTensorMode."""
    shape = config.layout.micro_batch, config.data.seq_len
    return Fakes(*(torch.zeros(shape, dtype=torch.int64) for _ in Fakes._fields))


class AssumedFeeder(Feeder):
    """For documents that have no numbers: each row is one to varlen kernels, and some to a mask."""

    def __init__(self, config: RunConfig, mesh: Mesh, *, as_gpu: bool) -> None:
        super().__init__(config, mesh)
        kind = attention_kind(config.kernels.attention, "cuda" if as_gpu else "cpu", config.layout.precision)
        self.varlen = kind == "varlen"
        self._traffic: Traffic | None = None
        self._before: list[tuple[Counter[Transfer], Counter[Transfer]]] = []

    def note(self, traffic: Traffic) -> None:
        """Remember what has been sent when each micro-batch begins."""
        self._traffic, self._before = traffic, []

    def middle(self) -> tuple[Counter[Transfer], Counter[Transfer]]:
        """Calls and bytes that a micro-batch sends that is neither the first nor the last."""
        (calls, payload), (calls_after, payload_after) = self._before[1:3]
        return calls_after - calls, payload_after - payload

    def __call__(
        self, tokens: Tensor, documents: Tensor | None, positions: Tensor, targets: Tensor | None = None
    ) -> Fed:
        """See Feeder."""
        assert documents is not None
        if self._traffic is not None:
            self._before.append((Counter(self._traffic.calls), Counter(self._traffic.payload_bytes)))
        length = documents.shape[1]
        structure = self._part(documents) if self.ways > 1 else self._whole(documents)
        if self.ways == 1:
            return Fed(tokens, positions, structure, targets)
        mine = places(length, self.ways, self.part)
        return Fed(tokens[:, mine], positions[:, mine], structure, None if targets is None else targets[:, mine])

    def _whole(self, documents: Tensor) -> Structure:
        if self.varlen:
            return Structure("varlen", documents, starts=_starts(len(documents)))
        return Structure("mask", documents, mask=additive(allowed_pairs(documents), self.dtype))

    def _part(self, documents: Tensor) -> Structure:
        length = documents.shape[1]
        queries_at, keys_at = places(length, self.ways, self.part), gathered_places(length, self.ways)
        gather = gather_over(self.mesh.context)
        if not self.varlen:
            mask = additive(allowed_pairs(documents, queries_at, keys_at), self.dtype)
            return Structure("mask", documents, mask=mask, part=ContextShard(gather, queries_at, keys_at))
        with unset_fake_temporarily():
            starts, _, take, longest = varlen_part(torch.zeros(documents.shape), self.ways, self.part)
            segments, taken = len(starts), len(take)
        take = torch.empty(taken, dtype=torch.int64)
        key_starts = torch.empty(segments, dtype=torch.int32)
        part = ContextShard(gather, queries_at, keys_at, take, key_starts, longest)
        return Structure("varlen", documents, starts=torch.empty(segments, dtype=torch.int32), part=part)


def _starts(documents: int) -> Tensor:
    return torch.empty(1 << documents.bit_length(), dtype=torch.int32)


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
            stage._inference_mode = InferenceMode.STATIC  # what ranks agree on where all know their shapes

    with ExitStack() as stack:
        # It tells by address whether a shard is padded already, and would pad it twice, next to the optimizer's copy.
        stack.enter_context(patch.object(FSDPParam, "reset_sharded_param", lambda _: None))
        stack.enter_context(patch.object(schedules._PipelineSchedule, "_warmup_p2p", warm_up))
        stack.enter_context(patch.object(schedules, "_batch_p2p", hold))
        yield


@contextmanager
def gpu_ways() -> Iterator[None]:
    """Take the RMS norm that runs on a GPU."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        found: Tensor = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)[0]
        return found

    with ExitStack() as stack:
        stack.enter_context(patch.object(transformer, "rms_norm", rms_norm))
        stack.enter_context(patch.object(tensor_parallel, "rms_norm", rms_norm))
        yield
