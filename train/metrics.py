"""Numbers about steps: they stay on the device until they are logged, and then move in one transfer."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minka.parallel.engine import Sums
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.flops import training_flops_per_token
from minka.plan.hardware import find
from minka.train.state import State

PARTS = ("data", "compute", "save", "eval")


class Stopwatch:
    """Wall seconds since the last reading, split into PARTS. On a GPU, compute is what the host waited for."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the block's duration to `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """The seconds of each part since the last call."""
        read, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return read


class StepRecord(NamedTuple):
    """One step as the ledger has it."""

    step: int
    tokens: int
    loss: float  # nats per target token, no z-loss
    z_loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    target_count: int
    seconds: dict[str, float]


@dataclass
class Metrics:
    """The steps since the last flush; every rank keeps the same ones, so that all ranks judge equally."""

    config: RunConfig
    mesh: Mesh
    _waiting: list[tuple[State, int, float, dict[str, float]]] = field(default_factory=list)
    _numbers: list[Tensor] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _tokens_at: int = 0

    def start(self, state: State) -> None:
        """Begin to measure speed at `state`."""
        self._since, self._tokens_at = time.perf_counter(), state.tokens

    def note(self, state: State, sums: Sums, norm: Tensor, rate: float, targets: int, watch: Stopwatch) -> None:
        """Keep a step; nothing is read from the device."""
        self._numbers.append(torch.stack([sums.loss.double(), sums.z_loss.double(), norm.double()]))
        self._waiting.append((state, targets, rate, watch.read()))

    @property
    def due(self) -> bool:
        """Whether tracking.log_every steps are waiting."""
        return len(self._waiting) >= self.config.tracking.log_every

    def flush(self) -> list[StepRecord]:
        """The steps since the last flush, read from the device at once."""
        if not self._waiting:
            return []
        numbers = torch.stack(self._numbers).tolist()
        records = [
            StepRecord(s.step, s.tokens, loss / max(targets, 1), z / max(targets, 1), norm, rate, targets, seconds)
            for (s, targets, rate, seconds), (loss, z, norm) in zip(self._waiting, numbers, strict=True)
        ]
        self._waiting.clear()
        self._numbers.clear()
        return records

    def speed(self, state: State, left_out_seconds: float) -> dict[str, float | None]:
        """tokens_per_second and mfu since the last call, without saves and evaluations; mfu is None where unknown."""
        elapsed = max(time.perf_counter() - self._since - left_out_seconds, 1e-9)
        rate = (state.tokens - self._tokens_at) / elapsed
        self.start(state)
        return {"tokens_per_second": rate, "mfu": device_mfu(rate, self.config, self.mesh)}


def device_mfu(tokens_per_second: float, config: RunConfig, mesh: Mesh) -> float | None:
    """Share of the peak of all ranks' GPUs, by the exact causal count (plan/flops.py); None for an unknown device."""
    if mesh.device.type != "cuda":
        return None
    gpu = find(torch.cuda.get_device_name(mesh.device))
    if gpu is None:
        return None
    rate = tokens_per_second * training_flops_per_token(config.model, config.data.seq_len)
    return rate / (gpu.peak_flops * mesh.ranks)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on the device so far; of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
