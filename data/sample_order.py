"""The order of a run's samples: sample i follows from (windows of the split, seed, dropped ranges, i) alone.

An epoch is a keyed permutation of the split's windows: a Feistel network on the smallest power of two that is not
less than their number, applied again while its result is outside (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains"). Any index can be computed at any time, so a run resumes from one number and needs no index file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
CHUNK = 16_384  # indices permuted at once: the arrays of a chunk stay in the cache
# Odd 64-bit multipliers (golden ratio; xorshift-multiply of Pelle Evensen's rrmxmx).
MULTIPLY_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLY_2 = np.uint64(0x9FB21C651E98DF25)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SampleOrder:
    """Which window of the split each sample of a run is.

    windows: samples in one epoch. dropped: rising, disjoint [first, last) ranges of *positions*. A position is the
    index of a sample before anything is dropped, so it identifies the sample whatever is dropped later.
    """

    windows: int
    seed: int
    dropped: tuple[tuple[int, int], ...] = ()

    def positions(self, first: int, last: int) -> Indices:
        """Positions of the run's samples first .. last-1. Dropped ranges are skipped."""
        samples = np.arange(first, last, dtype=np.int64)
        if not self.dropped:
            return samples
        starts = np.array([a for a, _ in self.dropped], dtype=np.int64)
        cumulative = np.cumsum([b - a for a, b in self.dropped], dtype=np.int64)
        # Range j shifts the samples from number starts[j] - (positions dropped before it) on.
        turn = starts - np.concatenate(([0], cumulative[:-1]))
        return samples + np.concatenate(([0], cumulative))[np.searchsorted(turn, samples, side="right")]

    def windows_at(self, positions: Sequence[int] | Indices) -> Indices:
        """The window (0 <= k < windows) at each position. Every epoch has a new permutation."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.windows)
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(within[chosen], self.windows, self.seed, int(epoch))
        return out


def permute(indices: Indices, count: int, seed: int, epoch: int) -> Indices:
    """The image of each of `indices` ([N], 0 <= i < count) under a bijection of 0 .. count-1 keyed by (seed, epoch)."""
    text = b"minka order" + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    keys = np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)
    out = np.empty(len(indices), dtype=np.int64)
    for start in range(0, len(indices), CHUNK):
        x = _encipher(indices[start : start + CHUNK].astype(np.uint64), count, keys)
        outside = np.flatnonzero(x >= count)
        while outside.size:
            x[outside] = _encipher(x[outside], count, keys)
            outside = outside[x[outside] >= count]
        out[start : start + CHUNK] = x
    return out


def _encipher(x: NDArray[np.uint64], count: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = max(2, (count - 1).bit_length())
    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = (right + key) * MULTIPLY_1
        mixed ^= mixed >> np.uint64(32)
        mixed *= MULTIPLY_2
        mixed >>= np.uint64(64 - left_bits)
        mixed ^= left
        left, right = right, mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def window_count(tokens: int, seq_len: int) -> int:
    """Number of windows of seq_len tokens in a stream of `tokens` tokens. Each has a target; the last may be short.

    Window k has tokens s[kT : kT+T] and targets s[kT+1 : kT+T+1], so the stream's last token is only ever a target.
    """
    return max(0, -(-(tokens - 1) // seq_len))
