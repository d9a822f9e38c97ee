"""The order of a run's samples: sample i follows from (windows of the split, seed, dropped ranges, i) alone.

An epoch is a keyed permutation of the split's windows: a Feistel network on the smallest power of two that is not
less than their number, applied again while its result is outside (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains"). Any index can be computed at any time, so a run resumes from one number and needs no index file.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
CHUNK = 16_384  # indices permuted at once: the arrays of a chunk stay in the cache
# Odd 64-bit multipliers (golden ratio; xorshift-multiply of Pelle Evensen's rrmxmx).
MULTIPLY_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLY_2 = np.uint64(0x9FB21C651E98DF25)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPermutation:
    """A bijection of 0 .. count-1, keyed by (seed, epoch); the same on every machine."""

    count: int
    seed: int
    epoch: int
    keys: NDArray[np.uint64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a permutation of {self.count} indices")
        key = b"minka order" + self.seed.to_bytes(8, "little") + self.epoch.to_bytes(8, "little")
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        object.__setattr__(self, "keys", np.frombuffer(digest, dtype="<u8").astype(np.uint64))

    def at(self, indices: Indices) -> Indices:
        """The image of each of `indices` ([N], each 0 <= i < count). int64 [N]."""
        out = np.empty(len(indices), dtype=np.int64)
        for start in range(0, len(indices), CHUNK):
            out[start : start + CHUNK] = self._walk(indices[start : start + CHUNK].astype(np.uint64))
        return out

    def _walk(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = self._encipher(x)
        outside = np.flatnonzero(x >= self.count)
        while outside.size:
            x[outside] = self._encipher(x[outside])
            outside = outside[x[outside] >= self.count]
        return x

    def _encipher(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = max(2, (self.count - 1).bit_length())
        right_bits = bits // 2
        left_bits = bits - right_bits
        left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
        for key in self.keys:
            mixed = (right + key) * MULTIPLY_1
            mixed ^= mixed >> np.uint64(32)
            mixed *= MULTIPLY_2
            mixed >>= np.uint64(64 - left_bits)
            mixed ^= left
            left, right = right, mixed
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


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
            out[chosen] = EpochPermutation(self.windows, self.seed, int(epoch)).at(within[chosen])
        return out


def window_count(tokens: int, seq_len: int) -> int:
    """Number of windows of seq_len tokens in a stream of `tokens` tokens. Each has a target; the last may be short.

    Window k has tokens s[kT : kT+T] and targets s[kT+1 : kT+T+1], so the stream's last token is only ever a target.
    """
    return max(0, -(-(tokens - 1) // seq_len))
