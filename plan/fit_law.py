"""Fit L = E + A / N^alpha + B / D^beta to runs as Hoffmann et al. 2022 did (arXiv:2203.15556, appendix D.3).

The least sum over runs of Huber(log-sum-exp(a - alpha ln N, b - beta ln D, e) - ln L), linear beyond 1e-3, where A, B
and E are the exponentials of a, b and e. Besiroglu et al. 2024 (arXiv:2404.10102) use the sum as well: with the mean,
optimizers stop early. The minimum is found by Gauss's and Newton's steps with Levenberg's damping, for many starts or
resampled sets of runs at once.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HUBER = 1e-3
# Of the published fit: alpha, beta, e, a, b; 4,500 of them.
GRID = (
    np.arange(0, 2.1, 0.5),
    np.arange(0, 2.1, 0.5),
    np.arange(-1, 1.1, 0.5),
    np.arange(0, 26, 5),
    np.arange(0, 26, 5),
)
STEPS, POLISH = 200, 8
SMOOTHING = (1.0, 0.03, 0.01, 3e-3, HUBER)  # the first is least squares
BEST = 5  # starts that are followed to their end


class Runs(NamedTuple):
    """What is fitted: weights, tokens and losses, one of each a run."""

    parameters: Array
    tokens: Array
    losses: Array

    def pick(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> "Runs":
        """Some of them."""
        return Runs(self.parameters[which], self.tokens[which], self.losses[which])


class Fit(NamedTuple):
    """Of one or of several sets: [..., 5] with the columns a, b, e, alpha, beta, and the objective [...]."""

    logs: Array
    objective: Array

    @property
    def numbers(self) -> Array:
        """The columns A, B, E, alpha, beta."""
        return np.concatenate([np.exp(self.logs[..., :3]), self.logs[..., 3:]], axis=-1)


def grid_starts() -> Array:
    """The published starts, [4500, 5]: a, b, e, alpha, beta."""
    return np.array([(a, b, e, alpha, beta) for alpha, beta, e, a, b in product(*GRID)], dtype=np.float64)


def fit_law(runs: Runs, starts: Array | None = None) -> Fit:
    """Return the best fit of all starts; by default of the five best points of the published grid."""
    x = _logarithms(runs)
    if starts is None:
        grid = grid_starts()
        starts = grid[np.argsort(_objective(grid, x, None, 1.0))[:BEST]]
    found = _follow(starts, x, None, SMOOTHING)
    best = int(np.argmin(found.objective))
    return Fit(found.logs[best], found.objective[best])


def bootstrap(runs: Runs, fitted: Fit, times: int, seed: int = 42) -> Fit:
    """Return fits of `times` sets that are drawn from the runs with replacement, [times, 5]."""
    count = len(runs.losses)
    drawn = np.random.default_rng(seed).integers(0, count, (times, count))
    # A run that is drawn twice counts twice: the same runs, other weights.
    weights = np.zeros((times, count))
    np.add.at(weights, (np.arange(times)[:, None], drawn), 1.0)
    return _follow(np.repeat(fitted.logs[None], times, axis=0), _logarithms(runs), weights, SMOOTHING[-2:])


def residuals(runs: Runs, fitted: Fit) -> Array:
    """ln of the predicted loss less that of the measured one, by run."""
    x = _logarithms(runs)
    return _predicted(fitted.logs[None], x)[0][0] - x[:, 2]


def _logarithms(runs: Runs) -> Array:
    return np.log(np.stack([runs.parameters, runs.tokens, runs.losses], axis=1))


def _predicted(logs: Array, x: Array) -> tuple[Array, Array]:
    """ln L [S, runs] of each row of logs [S, 5], and the shares [S, runs, 3] of the three terms in L."""
    terms = np.stack(
        [
            logs[:, None, 0] - logs[:, None, 3] * x[None, :, 0],
            logs[:, None, 1] - logs[:, None, 4] * x[None, :, 1],
            np.broadcast_to(logs[:, None, 2], (len(logs), len(x))),
        ],
        axis=-1,
    )
    top = terms.max(axis=-1)
    shares = np.exp(terms - top[..., None])
    total = shares.sum(axis=-1)
    return top + np.log(total), shares / total[..., None]


def _objective(logs: Array, x: Array, weights: Array | None, huber: float) -> Array:
    off = np.abs(_predicted(logs, x)[0] - x[:, 2])
    cost = np.where(off <= huber, off * off / 2, huber * (off - huber / 2))
    return np.asarray((cost if weights is None else cost * weights).sum(axis=-1))


def _follow(logs: Array, x: Array, weights: Array | None, smoothing: Sequence[float]) -> Fit:
    """From each start to its minimum: of least squares first, then with less and less of it smoothed.

    Where residuals are larger than HUBER the objective is nearly one of absolute values, whose own curvature is
    nothing: until the last steps each residual is weighted instead, which leads down from anywhere.
    """
    for huber in smoothing:
        logs = _descend(logs, x, weights, huber, exact=False).logs
    return _polished(_descend(logs, x, weights, HUBER, exact=True), x, weights)


def _polished(found: Fit, x: Array, weights: Array | None) -> Fit:
    """Newton's steps while they make the gradient smaller: the objective itself is too flat to tell the last digits."""
    logs = found.logs.copy()
    gradient, hessian = _derivatives(logs, x, weights, HUBER, exact=True)
    for _ in range(POLISH):
        tried = logs - _solved(hessian, gradient)
        there, bent = _derivatives(tried, x, weights, HUBER, exact=True)
        better = np.abs(there).max(axis=-1) < np.abs(gradient).max(axis=-1)
        if not better.any():
            break
        logs[better], gradient[better], hessian[better] = tried[better], there[better], bent[better]
    return Fit(logs, _objective(logs, x, weights, HUBER))


def _descend(logs: Array, x: Array, weights: Array | None, huber: float, *, exact: bool) -> Fit:
    """Step until a step gains nothing. Each start has a damping of its own, and only steps down are taken."""
    logs, damping = logs.copy(), np.full(len(logs), 1e-3)
    cost = _objective(logs, x, weights, huber)
    moving = np.ones(len(logs), dtype=bool)
    for _ in range(STEPS):
        at = np.flatnonzero(moving)
        if not len(at):
            break
        chosen = None if weights is None else weights[at]
        gradient, hessian = _derivatives(logs[at], x, chosen, huber, exact)
        scale = np.einsum("sii->si", np.abs(hessian)).clip(1e-300)
        scale = np.maximum(scale, 1e-9 * scale.max(axis=-1, keepdims=True))
        step = -_solved(hessian + damping[at, None, None] * np.eye(5) * scale[:, :, None], gradient)
        there = _objective(logs[at] + step, x, chosen, huber)
        better = there < cost[at]
        gained = cost[at] - there
        logs[at[better]] += step[better]
        cost[at[better]] = there[better]
        damping[at] = np.where(better, damping[at] / 4, damping[at] * 5).clip(1e-13, 1e12)
        converged = np.abs(step).max(axis=-1) < 1e-13 if exact else gained < 1e-6 * cost[at]
        done = (better & converged) | (damping[at] > 1e6)
        moving[at[done]] = False
    return Fit(logs, cost)


def _solved(matrices: Array, right: Array) -> Array:
    """Solutions of several positive systems, [S, 5]: negative curvature is turned around."""
    values, vectors = np.linalg.eigh(matrices)
    values = np.maximum(np.abs(values), 1e-14 * np.abs(values).max(axis=-1, keepdims=True))
    return np.einsum("sij,sj,skj,sk->si", vectors, 1 / values, vectors, right)


def _derivatives(logs: Array, x: Array, weights: Array | None, huber: float, exact: bool) -> tuple[Array, Array]:
    """Gradient [S, 5] and Hessian [S, 5, 5] of the objective; exact: else that of weighted least squares above it."""
    predicted, shares = _predicted(logs, x)
    off = predicted - x[:, 2]
    slope = np.clip(off, -huber, huber)
    curve = (np.abs(off) <= huber).astype(np.float64) if exact else huber / np.maximum(np.abs(off), huber)
    if weights is not None:
        slope, curve = slope * weights, curve * weights
    # Terms depend on (a, alpha), (b, beta) and e: d ln L = share x (1, -ln N), and so on.
    n, d = np.broadcast_to(x[None, :, 0], off.shape), np.broadcast_to(x[None, :, 1], off.shape)
    first, second, floor = shares[..., 0], shares[..., 1], shares[..., 2]
    jacobian = np.stack([first, second, floor, -first * n, -second * d], axis=-1)
    gradient = np.einsum("sr,sri->si", slope, jacobian)
    if not exact:
        return gradient, _outer(jacobian, curve)
    hessian = _outer(jacobian, curve - slope)  # -slope x J J' is part of the curvature of ln L
    for columns, share, at in (((0, 3), first, n), ((1, 4), second, d), ((2,), floor, None)):
        inner = [np.ones_like(share)] if at is None else [np.ones_like(share), -at]
        for i, left in zip(columns, inner, strict=True):
            for j, right in zip(columns, inner, strict=True):
                hessian[:, i, j] += (slope * share * left * right).sum(axis=-1)
    return gradient, hessian


def _outer(jacobian: Array, weights: Array) -> Array:
    """The sums over runs of weight x J J', [S, 5, 5]."""
    return np.matmul((jacobian * weights[..., None]).transpose(0, 2, 1), jacobian)
