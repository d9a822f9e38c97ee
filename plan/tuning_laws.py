"""Batch size, learning rate and weight decay by published laws: bands with their sources, because the laws disagree."""

import math
from typing import Any, NamedTuple

SOURCES = {
    "step": "Step Law, Li et al. 2025, arXiv:2503.04715",
    "deepseek": "DeepSeek LLM, Bi et al. 2024, arXiv:2401.02954",
    "porian": "Porian et al. 2024, arXiv:2406.19146",
}
POWER_LINES = "Power Lines, Bergsma et al. 2025, arXiv:2505.13738"


class Sizes(NamedTuple):
    """What the laws are functions of: weights with and without the vocabulary's, tokens, and 6 N D."""

    parameters: float
    without_vocabulary: float
    tokens: float

    @property
    def flops(self) -> float:
        return 6 * self.parameters * self.tokens


class Band(NamedTuple):
    """A value with those of all laws around it."""

    low: float
    value: float
    high: float
    source: str
    laws: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The keys of the JSON."""
        return self._asdict()


def batch_band(sizes: Sizes) -> Band:
    """Tokens of a batch: the middle one of three laws, and their span."""
    return _band(
        {
            "step": 0.58 * sizes.tokens**0.571,
            "deepseek": 0.2920 * sizes.flops**0.3271,
            "porian": 160 * 2048 * (sizes.parameters / 108e6) ** (2 / 3),
        }
    )


def rate_band(sizes: Sizes) -> Band:
    """Peak of AdamW's rate: the middle one of three laws, and their span."""
    return _band(
        {
            "step": 1.79 * sizes.without_vocabulary**-0.713 * sizes.tokens**0.307,
            "deepseek": 0.3118 * sizes.flops**-0.1250,
            "porian": 0.0047 * (sizes.parameters / 108e6) ** (-1 / 3),
        }
    )


def _band(laws: dict[str, float]) -> Band:
    middle = sorted(laws, key=laws.__getitem__)[len(laws) // 2]
    return Band(min(laws.values()), laws[middle], max(laws.values()), SOURCES[middle], laws)


def weight_decay(sizes: Sizes, batch: float, rate: float) -> tuple[float, str]:
    """The decay with which AdamW's memory of weights is the best share of a run, and its source.

    That share is B / (rate x decay x D), best at 1.084 (D / N)^-0.527.
    """
    share = 1.084 * (sizes.tokens / sizes.parameters) ** -0.527
    return batch / (rate * sizes.tokens * share), POWER_LINES


def rounded_batch(tokens: float, seq_len: int) -> int:
    """Return the batch nearest to `tokens` of 2^k or 3 x 2^k sequences, which many layouts can cut."""
    most = max(1.0, tokens / seq_len)
    sizes = [factor << k for k in range(int(math.log2(most)) + 2) for factor in (1, 3)]
    return min(sizes, key=lambda size: abs(math.log(size / most))) * seq_len


def beta2(batch: float) -> tuple[float, str]:
    """The second moment's decay: small batches need a longer memory."""
    return (0.99 if batch < 2**19 else 0.95), SOURCES["porian"]
