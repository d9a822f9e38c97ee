"""The loader: each rank's part of every global batch, in the run's one order, from a few numbers of state.

A step's global batch is the samples [n, n + G) of the run, padded to a multiple of ways * micro_batch; rank r takes
every ways-th. No rank, micro-batch or restart changes which samples a step has.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from minka.data.batch import PADDING, Batch, build_batch
from minka.data.sample_order import SampleOrder, window_count
from minka.data.token_store import Split
from minka.plan.config import RunConfig

DEPTH = 3  # batches built ahead: the next is ready while one is being trained on


@dataclass(frozen=True)
class LoaderState:
    """How much of the order is consumed, the same on every rank. tokens = samples * seq_len; padding does not count."""

    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, seq_len: int) -> "LoaderState":
        """The state when `samples` more samples of `seq_len` tokens have been consumed."""
        return LoaderState(self.samples + samples, self.tokens + samples * seq_len)


def order_of(config: RunConfig, split: Split) -> SampleOrder:
    """The order in which a run reads a split."""
    windows = window_count(split.n_tokens, config.data.seq_len)
    return SampleOrder(windows, config.run.seed, config.data.dropped_samples)


class LoadedBatch(NamedTuple):
    """What one step trains on: this rank's part of the global batch, its micro-batches, and the state after it."""

    batch: Batch
    micro_batches: list[Any]  # what `prepare` made of each
    state: LoaderState


class Loader(Iterator[LoadedBatch]):
    """Endless iterator over the parts of the global batches that are those of `rank`, among `ways` ranks.

    A thread builds DEPTH of them ahead, and calls `prepare` for each micro-batch: host work that the training does not
    wait for. What the thread raises is raised by `next`. Use it in a `with`, or close it.
    """

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        rank: int,
        ways: int,
        state: LoaderState | None = None,
        prepare: Callable[[Batch], Any] = lambda micro_batch: micro_batch,
    ) -> None:
        if not 0 <= rank < ways:
            raise ValueError(f"rank {rank} of {ways} ways")
        self.config, self.split, self.rank, self.ways, self.prepare = config, split, rank, ways, prepare
        self._order, self._state = order_of(config, split), state or LoaderState()  # of the thread
        self._thread = ThreadPoolExecutor(1, f"loader of rank {rank}")
        self._ahead = deque(self._thread.submit(self._build) for _ in range(DEPTH))

    def __next__(self) -> LoadedBatch:
        if not self._ahead:
            raise StopIteration
        self._ahead.append(self._thread.submit(self._build))
        return self._ahead.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it. May be called twice."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def _build(self) -> LoadedBatch:
        """The next part, padded with PADDING to as many sequences as the other ranks have."""
        config, first = self.config, self._state.samples
        size = config.batch_tokens_at(self._state.tokens) // config.data.seq_len
        whole = -(-size // (self.ways * config.layout.micro_batch)) * self.ways * config.layout.micro_batch
        every = np.full(whole, PADDING, dtype=np.int64)
        every[:size] = self._order.positions(first, first + size)
        positions = every[self.rank :: self.ways]
        windows = np.full(len(positions), PADDING, dtype=np.int64)
        real = positions != PADDING
        windows[real] = self._order.windows_at(positions[real])
        batch = build_batch(self.split.tokens, windows, positions, config.data.seq_len, self.split.eod)
        prepared = [self.prepare(part) for part in batch.micro_batches(config.layout.micro_batch)]
        self._state = self._state.after(size, config.data.seq_len)
        return LoadedBatch(batch, prepared, self._state)
