"""The loader: each rank's part of every global batch, in the run's one order, from a few numbers of state.

A step's global batch is the samples [n, n + G) of the run, padded to a multiple of ways * micro_batch; rank r takes
every ways-th. No rank, micro-batch or restart changes which samples a step has.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from minka.data.batch import PADDING, Batch, build_batch
from minka.data.sample_order import SampleOrder, window_count
from minka.data.token_store import Split
from minka.plan.config import RunConfig

DEPTH = 2  # batches built ahead: the next is ready while one is being trained on
POLL_SECONDS = 0.1  # how often a waiting thread checks whether the other side has ended


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


def global_batch(config: RunConfig, state: LoaderState) -> int:
    """Samples in the global batch that begins at `state` (batch warm-up included)."""
    return config.batch_tokens_at(state.tokens) // config.data.seq_len


def share(config: RunConfig, order: SampleOrder, state: LoaderState, rank: int, ways: int) -> NDArray[np.int64]:
    """Positions in the order of rank's sequences of the batch that begins at `state`; PADDING where there is none."""
    size = global_batch(config, state)
    whole = -(-size // (ways * config.layout.micro_batch)) * ways * config.layout.micro_batch
    positions = np.full(whole, PADDING, dtype=np.int64)
    positions[:size] = order.positions(state.samples, state.samples + size)
    return positions[rank::ways]


def read_batch(config: RunConfig, split: Split, order: SampleOrder, positions: NDArray[np.int64]) -> Batch:
    """The batch of the samples at `positions` ([B], PADDING allowed)."""
    windows = np.full(len(positions), PADDING, dtype=np.int64)
    real = positions != PADDING
    windows[real] = order.windows_at(positions[real])
    return build_batch(split.tokens, windows, positions, config.data.seq_len, split.eod)


class Loaded(NamedTuple):
    """What one step trains on: this rank's part of the global batch, its micro-batches, and the state after it."""

    batch: Batch
    micro_batches: list[Any]  # what `prepare` made of each
    state: LoaderState


class Loader(Iterator[Loaded]):
    """Endless iterator over this rank's parts of the global batches.

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
        self._ready: queue.Queue[Loaded | BaseException] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(state or LoaderState(),), name=f"loader of rank {rank}", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Loaded:
        if self._closed.is_set():
            raise StopIteration
        if self._failure is None:
            item = self._take()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it. May be called twice."""
        self._closed.set()
        self._thread.join()

    def _take(self) -> Loaded | BaseException:
        while True:
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return RuntimeError(f"the thread '{self._thread.name}' ended without an error")

    def _work(self, state: LoaderState) -> None:
        try:
            order = order_of(self.config, self.split)
            while not self._closed.is_set():
                positions = share(self.config, order, state, self.rank, self.ways)
                batch = read_batch(self.config, self.split, order, positions)
                prepared = [self.prepare(part) for part in batch.micro_batches(self.config.layout.micro_batch)]
                state = state.after(global_batch(self.config, state), self.config.data.seq_len)
                self._put(Loaded(batch, prepared, state))
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: Loaded | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
