"""A claim of `make bench`: what is measured, in which unit, and the bound that must hold."""

import statistics
from collections.abc import Callable
from typing import NamedTuple


class Claim(NamedTuple):
    """One row of the table."""

    name: str
    measure: Callable[[], float]
    bound: float
    unit: str
    larger_is_better: bool = False

    def holds(self, value: float, slack: float = 1.0) -> bool:
        """Return whether `value` keeps the share `slack` of the bound."""
        if self.larger_is_better:
            return value >= slack * self.bound
        return value <= self.bound / slack


def median_ratio(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> float:
    """Return the median of our seconds / the peer's seconds over pairs. Each side goes first in turn."""
    ratios = []
    for pair in range(pairs):
        first, second = (ours, peer) if pair % 2 == 0 else (peer, ours)
        a, b = first(), second()
        ratios.append(a / b if pair % 2 == 0 else b / a)
    return statistics.median(ratios)
