"""How often to save: the interval that loses the least time to saves, failures and restarts, and what is left then.

Failures come at a constant rate, also during saves and restarts. After one the job restarts from its last save.
"""

import math
from typing import NamedTuple

from minka.plan.best_split import minimum


class Failures(NamedTuple):
    """Published rates of jobs that stopped by themselves."""

    per_1000_node_days: float  # of nodes with eight GPUs
    source: str


# Small jobs die of other causes than their nodes, so these are the least that a job of few nodes sees
# (arXiv:2410.21680: at 1,024 GPUs twice to four times what the rate of nodes says).
RATES = {
    "rsc-1": Failures(6.50, "Kokolis et al. 2024, arXiv:2410.21680: Meta's RSC-1, A100, eleven months"),
    "rsc-2": Failures(2.34, "Kokolis et al. 2024, arXiv:2410.21680: Meta's RSC-2, A100, eleven months"),
    "llama3": Failures(
        419 / (54 * 16384 / 8) * 1000,
        "Llama team 2024, arXiv:2407.21783, table 5: 419 unexpected interruptions in 54 days of 16,384 H100",
    ),
}
GPUS_OF_A_NODE = 8


def hours_between_failures(gpus: int, rate: str) -> float:
    """Return the mean hours between two failures of a job of so many GPUs."""
    nodes = max(1.0, gpus / GPUS_OF_A_NODE)
    return 24 * 1000 / (RATES[rate].per_1000_node_days * nodes)


class Goodput(NamedTuple):
    """What wall time is spent on, as shares; they add up to 1."""

    training: float  # the effective training time ratio
    saving: float
    again: float  # steps that failures undid
    restarting: float


class Cadence(NamedTuple):
    """Seconds: of what a save stalls training, of a restart with all that comes before its first new step, between
    failures on average, and from the start of a save until it can be restored (0: it is there when training goes on).
    """

    save: float
    restart: float
    between_failures: float
    flush: float = 0.0

    @property
    def young(self) -> float:
        """The interval of Young 1974: sqrt(2 save x between_failures)."""
        return math.sqrt(2 * self.save * self.between_failures)

    @property
    def daly(self) -> float:
        """The interval of Daly 2006, equation 37, in seconds of training between saves."""
        m, save = self.between_failures, self.save
        if save >= 2 * m:
            return m
        return self.young * (1 + math.sqrt(save / (2 * m)) / 3 + save / (2 * m) / 9) - save

    def goodput(self, interval: float) -> Goodput:
        """Shares of wall time with so many seconds of training between saves (Daly 2006, section 4, as shares).

        A stretch of training and its save has to run through without a failure; it is tried until it does, and so is
        every restart. What is not yet flushed is lost with the rest.
        """
        m = self.between_failures
        failures = math.expm1((interval + self.save) / m)  # of a stretch, on average
        stretch = m * failures
        restarts = failures * m * math.expm1(self.restart / m)
        flushes = failures * min(self.flush, interval)
        whole = stretch + restarts + flushes
        return Goodput(
            training=interval / whole,
            saving=self.save / whole,
            again=(stretch - interval - self.save + flushes) / whole,
            restarting=restarts / whole,
        )

    @property
    def best(self) -> float:
        """The interval of the most training: the exact optimum of `goodput`, which is never shorter than a flush."""
        most = math.log(20 * self.between_failures + 20 * self.save)
        found = math.exp(minimum(lambda x: -self.goodput(math.exp(x)).training, math.log(self.save + 1e-6) - 4, most))
        return max(found, self.flush)


def spare_nodes(nodes: float, between_failures_hours: float, repair_hours: float, sure: float = 0.99) -> int:
    """Return how many nodes to hold in reserve, so that with probability `sure` no more are in repair at once."""
    mean = repair_hours / between_failures_hours
    count, term = 0, math.exp(-mean)
    total = term
    while total < sure and count < nodes:
        count += 1
        term *= mean / count
        total += term
    return count
