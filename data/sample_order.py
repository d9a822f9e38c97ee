"""The order of a run's samples: sample i follows from (samples in the split, seed, dropped ranges, i) alone.

An epoch is a keyed permutation of the split's windows: a Feistel network on the smallest power of two that holds them,
walked along its cycles until it lands inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
Any index can be asked for at any time, so a run resumes from one number and no index file exists.
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
            raise ValueError(f"a permutation of {self.count} things")
        key = b"minka order" + self.seed.to_bytes(8, "little") + self.epoch.to_bytes(8, "little")
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        object.__setattr__(self, "keys", np.frombuffer(digest, dtype="<u8").astype(np.uint64))

    def at(self, indices: Indices) -> Indices:
        """Where each of `indices` (any shape [N], each 0 <= i < count) is sent. int64 [N]."""
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

    windows: samples in one epoch. dropped: rising, disjoint [first, last) ranges of *positions*. A position is a
    sample's place in the order before anything is dropped: it names a sample for good, whatever is dropped later.
    """

    windows: int
    seed: int
    dropped: tuple[tuple[int, int], ...] = ()

    def positions(self, first: int, last: int) -> Indices:
        """Positions of the run's samples first .. last-1: dropped ranges are stepped over."""
        samples = np.arange(first, last, dtype=np.int64)
        if not self.dropped:
            return samples
        starts = np.array([a for a, _ in self.dropped], dtype=np.int64)
        gone = np.cumsum([b - a for a, b in self.dropped], dtype=np.int64)
        # Range j begins to shift samples once starts[j] minus what was dropped before it have been taken.
        turn = starts - np.concatenate(([0], gone[:-1]))
        return samples + np.concatenate(([0], gone))[np.searchsorted(turn, samples, side="right")]

    def windows_at(self, positions: Sequence[int] | Indices) -> Indices:
        """The window (0 <= k < windows) at each position: permuted anew in every epoch."""
        asked = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(asked, self.windows)
        out = np.empty_like(asked)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = EpochPermutation(self.windows, self.seed, int(epoch)).at(within[here])
        return out

    def sample_at(self, sample: int) -> tuple[int, int]:
        """(position, window) of one sample of the run."""
        position = self.positions(sample, sample + 1)
        return int(position[0]), int(self.windows_at(position)[0])


def window_count(tokens: int, seq_len: int) -> int:
    """Windows of seq_len tokens in a stream of `tokens` tokens. Each has at least one target; the last may be short.

    Window k has tokens s[kT : kT+T] and targets s[kT+1 : kT+T+1], so the stream's last token is only ever a target.
    """
    return max(0, -(-(tokens - 1) // seq_len))
