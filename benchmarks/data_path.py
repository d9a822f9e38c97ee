"""Speed of the data path on one core: `python -m minka.benchmarks.data_path` prints a table and writes no file."""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from minka.data.batch import build_batch
from minka.data.sample_order import SampleOrder, permute, window_count
from minka.plan.cli import print_table

TOKENS = 20_000_000
SEQ_LEN = 2048
EOD = 0


def synthetic_stream(mean_length: int, tokens: int = TOKENS) -> NDArray[np.uint16]:
    """Return a token stream whose documents have log-normal lengths around `mean_length` and end with EOD."""
    random = np.random.default_rng(0)
    stream = random.integers(1, 32_000, tokens).astype(np.uint16)
    lengths = random.lognormal(np.log(mean_length), 0.7, 2 * tokens // mean_length).astype(np.int64) + 2
    ends = np.cumsum(lengths) - 1
    stream[ends[ends < tokens]] = EOD
    stream[-1] = EOD
    return stream


def samples_per_second(stream: NDArray[np.uint16], rows: int, seconds: float = 2.0) -> float:
    """Return the samples/s of this thread in batches of `rows`: order, gather, targets, documents, positions."""
    order = SampleOrder(window_count(len(stream), SEQ_LEN), seed=0)

    def batch(step: int) -> int:
        positions = order.positions(step * rows, (step + 1) * rows)
        build_batch(stream, order.windows_at(positions), positions, SEQ_LEN, EOD)
        return rows

    return _rate(batch, seconds)


def indices_per_second(count: int = 3_000_000, seconds: float = 2.0) -> float:
    """Return the indices of one epoch that this thread permutes in a second."""
    block = np.arange(1 << 17)

    def work(step: int) -> int:
        return len(permute((block + step * len(block)) % count, count, seed=0, epoch=0))

    return _rate(work, seconds)


def _rate(work: Callable[[int], int], seconds: float) -> float:
    work(0)
    done = step = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        done += work(step := step + 1)
    return done / (time.perf_counter() - began)


def main() -> int:
    """Print the table."""
    argparse.ArgumentParser(description="Speed of the data path on one core, as a table.").parse_args()
    torch.set_num_threads(1)
    print(f"permuted indices: {indices_per_second() / 1e6:.1f} M/s")
    print(f"samples of {SEQ_LEN} tokens on one thread:")
    rows = []
    for mean_length in (4000, 1000, 100, 20):
        stream = synthetic_stream(mean_length)
        for batch in (8, 32, 256):
            rate = samples_per_second(stream, batch)
            rows.append((mean_length, batch, f"{rate:,.0f}", f"{rate * SEQ_LEN / 1e6:.1f}"))
    print_table(rows, ["tokens per document", "sequences per batch", "samples/s", "Mtok/s"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
