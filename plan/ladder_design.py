"""Which small runs tell most about the best size of a large one, and how much, before any is trained."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minka.plan.errors import UserError
from minka.plan.loss_laws import LossLaw

MULTIPLES = (
    (5.0, 10.0, 20.0, 40.0),
    (5.0, 20.0, 80.0),
    (5.0, 10.0, 20.0, 40.0, 80.0),
    (2.5, 10.0, 40.0, 160.0),
)  # tokens a weight
DECAY = 0.2  # of a run: its rate falls (Haegele et al. 2024, arXiv:2405.18392)
RUNGS = (4, 5, 6, 7, 8)  # sizes
BELOW = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # by how much the largest size is smaller: no law is trusted further
STEP = (1.5, 2.0, 3.0)  # from one size to the next
SURE = 1.96  # standard deviations of a 95 % interval


class Ladder(NamedTuple):
    """Sizes with the tokens at which their runs end, what they take, and how sure they make the optimum.

    width: of the 95 % interval of ln N at the target, one side.
    """

    sizes: tuple[float, ...]
    multiples: tuple[float, ...]
    flops: float
    width: float


def points_of(sizes: Sequence[float], multiples: Sequence[float]) -> list[tuple[float, float]]:
    """(weights, tokens) of each loss that is fitted."""
    return [(size, size * multiple) for size in sizes for multiple in multiples]


def cheapest_ladder(law: LossLaw, flops: float, within: float, smallest: float, noise: float) -> Ladder:
    """Return the ladder of the fewest FLOPs after which the target's best size is known to a factor of 1 + within.

    law: as it is believed to be. noise: standard deviation of ln L of a run. Raises UserError where no ladder of less
    than the target itself tells so much.
    """
    tried = [one for one in ladders(law, flops, smallest, noise) if one.flops < flops]
    good = [one for one in tried if one.width <= math.log1p(within)]
    if not good:
        best = min((one.width for one in tried), default=math.inf)
        what = f"no ladder cheaper than the run itself tells the best size to {within:.0%}"
        reach = f"{math.expm1(best):.0%} can be reached" if tried else "the target is too small for a ladder"
        raise UserError(what, where="--within", remedy=f"{reach}: give more, or a larger target")
    return min(good, key=lambda one: one.flops)


def ladders(law: LossLaw, flops: float, smallest: float, noise: float) -> Iterator[Ladder]:
    """All that are considered."""
    best = law.optimum(flops).parameters
    for below in BELOW:
        for step in STEP:
            for rungs in RUNGS:
                sizes = tuple(best / below / step**number for number in reversed(range(rungs)))
                for multiples in MULTIPLES if sizes[0] >= smallest else ():
                    width = width_of_optimum(law, flops, points_of(sizes, multiples), noise)
                    yield Ladder(sizes, multiples, cost(sizes, multiples), width)


def cost(sizes: Sequence[float], multiples: Sequence[float]) -> float:
    """FLOPs of a trunk for each size, and of a decay for each end but the last, which is the trunk's own."""
    tokens = max(multiples) + sum(DECAY * multiple for multiple in sorted(multiples)[:-1])
    return sum(6 * size * size * tokens for size in sizes)


def width_of_optimum(law: LossLaw, flops: float, points: Sequence[tuple[float, float]], noise: float) -> float:
    """Half of the 95 % interval of ln N at the optimum, by the linear theory of least squares.

    The derivatives of ln L by ln A, ln B, ln E, alpha and beta are the terms' shares of L, the last two times -ln N and
    -ln D (plan/fit_law.py). Fits with absolute values are less sure by sqrt(pi / 2).
    """
    n, d = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    first, second = law.A / n**law.alpha, law.B / d**law.beta
    total = first + second + law.E
    shares = [first / total, second / total, law.E / total, -first / total * np.log(n), -second / total * np.log(d)]
    jacobian = np.stack(shares, axis=1)
    covariance = noise**2 * math.pi / 2 * np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-14)
    gradient = _gradient_of_optimum(law, flops)
    return SURE * math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))


def _gradient_of_optimum(law: LossLaw, flops: float) -> np.ndarray:
    """Of ln N by ln A, ln B, ln E, alpha and beta."""

    def best(change: Sequence[float]) -> float:
        a, b, floor, alpha, beta = change
        moved = LossLaw.of(
            "", [law.A * math.exp(a), law.B * math.exp(b), law.E * math.exp(floor), law.alpha + alpha, law.beta + beta]
        )
        return math.log(moved.optimum(flops).parameters)

    small = 1e-5
    steps = np.eye(5) * small
    return np.array([(best(step) - best(-step)) / (2 * small) for step in steps])
