"""Numbers about steps: they stay on the device until they are logged, and then move in one transfer."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minka.parallel.engine import Sums
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.flops import training_flops_per_token
from minka.plan.hardware import find_gpu
from minka.train.state import State

PARTS = ("data", "compute", "save", "eval")
READINGS = 20  # the newest ones, from which the remaining time is estimated


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

    state: State  # after the step, not judged yet
    loss: float  # nats per target token, no z-loss
    z_loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    target_count: int
    seconds: dict[str, float]

    @property
    def step(self) -> int:
        """Its number."""
        return self.state.step

    @property
    def tokens(self) -> int:
        """Consumed by it and all before it."""
        return self.state.tokens


@dataclass
class Metrics:
    """The steps since the last flush; every rank keeps the same ones, so that all ranks judge equally."""

    config: RunConfig
    mesh: Mesh
    state: State  # at the last measurement of speed; at first, where training starts
    _since: float = field(default_factory=time.perf_counter)
    _waiting: list[tuple[State, Tensor, float, int, dict[str, float]]] = field(default_factory=list)
    _readings: deque[tuple[float, State]] = field(default_factory=lambda: deque(maxlen=READINGS))
    _every: int = 1  # steps until the next reading: the first step of a session is read at once

    def note(self, state: State, sums: Sums, norm: Tensor, rate: float, targets: int, watch: Stopwatch) -> None:
        """Keep a step; nothing is read from the device."""
        numbers = torch.stack([sums.loss.double(), sums.z_loss.double(), norm.double()])
        self._waiting.append((state, numbers, rate, targets, watch.read()))

    @property
    def due(self) -> bool:
        """Whether tracking.log_every steps are waiting, or the first of the session is."""
        return len(self._waiting) >= self._every

    def flush(self) -> list[StepRecord]:
        """The steps since the last flush, read from the device at once."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, []
        rows = torch.stack([numbers for _, numbers, *_ in waiting]).tolist()
        every = self.config.tracking.log_every
        self._every = every if self._readings else max(1, every - 1)  # then at the multiples of log_every
        self._readings.append((time.perf_counter(), waiting[-1][0]))
        return [
            StepRecord(state, loss / max(targets, 1), z / max(targets, 1), norm, rate, targets, seconds)
            for (state, _, rate, targets, seconds), (loss, z, norm) in zip(waiting, rows, strict=True)
        ]

    def seconds_left(self) -> float | None:
        """Until the end of the run, saves and evaluations included; None before the second reading.

        The first step is left out: it compiles and allocates.
        """
        (began, first), (now, last) = self._readings[0], self._readings[-1]
        _, end = self.config.end(last.step, last.tokens)
        return (end - last.tokens) * (now - began) / (last.tokens - first.tokens) if last != first else None

    def speed(self, state: State, left_out_seconds: float) -> dict[str, float | None]:
        """tokens_per_second and mfu since the last call, without saves and evaluations; mfu is None where unknown."""
        now = time.perf_counter()
        rate = (state.tokens - self.state.tokens) / max(now - self._since - left_out_seconds, 1e-9)
        self._since, self.state = now, state
        gpu = find_gpu(torch.cuda.get_device_name(self.mesh.device)) if self.mesh.device.type == "cuda" else None
        share = None
        if gpu is not None:  # of all ranks' GPUs, by the exact causal count (plan/flops.py)
            flops = training_flops_per_token(self.config.model, self.config.data.seq_len)
            share = rate * flops / (gpu.peak_flops * self.mesh.ranks)
        return {"tokens_per_second": rate, "mfu": share}


def interval_numbers(records: Sequence[StepRecord]) -> dict[str, float]:
    """For a curve: means over the steps since the last point; of refused steps only where there are no others."""
    accepted = [r for r in records if math.isfinite(r.loss + r.grad_norm)] or records
    targets = sum(r.target_count for r in accepted)
    return {
        "loss": sum(r.loss * r.target_count for r in accepted) / max(targets, 1),
        "z_loss": sum(r.z_loss * r.target_count for r in accepted) / max(targets, 1),
        "grad_norm": sum(r.grad_norm for r in accepted) / len(accepted),
        "learning_rate": records[-1].learning_rate,
        "tokens": records[-1].tokens,
        **{f"seconds/{part}": sum(r.seconds[part] for r in records) / len(records) for part in PARTS},
    }


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on the device so far; of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
