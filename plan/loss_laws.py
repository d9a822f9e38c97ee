"""Scaling laws as published: the loss of N weights after D tokens, and how a budget is best split between the two.

FLOPs of training are 6 N D, as in the papers. Losses are nats a token, of each paper's own text and tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minka.plan.errors import UserError

PF_DAY = 8.64e19  # FLOPs


class BudgetSplit(NamedTuple):
    """A budget as weights and tokens."""

    parameters: float
    tokens: float


class Allocation(Protocol):
    """A law that splits a budget."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def note(self) -> str: ...
    def optimum(self, flops: float) -> BudgetSplit: ...


Numbers = tuple[float, float, float, float, float]  # A, B, E, alpha, beta
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3).

    spread: of ln L about the law, a standard deviation. bootstrap: (A, B, E, alpha, beta) of refits, for intervals.
    """

    name: str
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    source: str
    note: str = ""
    spread: float = 0.0075
    bootstrap: tuple[Numbers, ...] = ()

    @classmethod
    def of(
        cls, name: str, numbers: Sequence[float], *, source: str = "", spread: float = 0.0, refits: Rows = ()
    ) -> "LossLaw":
        """From A, B, E, alpha and beta, and those of refits."""
        a, b, floor, alpha, beta = numbers
        rows = tuple((r[0], r[1], r[2], r[3], r[4]) for r in refits)
        return cls(name, a, b, floor, alpha, beta, source, spread=spread, bootstrap=rows)

    @property
    def exponent(self) -> float:
        """The a of N = G (C/6)^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def scale(self) -> float:
        """The G of N = G (C/6)^a and D = (C/6)^(1-a) / G."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> BudgetSplit:
        """The split with the lowest loss; C = 6 N D (equation 4)."""
        product = flops / 6
        return BudgetSplit(self.scale * product**self.exponent, product ** (1 - self.exponent) / self.scale)

    def flops_for(self, loss: float) -> float:
        """The least FLOPs with which the loss is reached. Raises UserError for one that no budget reaches."""
        if not loss > self.E:
            what = f"a loss of {loss:g} is below what the law {self.name!r} says is possible, {self.E:.4g}"
            raise UserError(what, where="--loss", remedy=f"ask for more than {self.E:.4g} nats a token")
        # At the optimum both terms fall with C to the same power.
        power = self.alpha * self.beta / (self.alpha + self.beta)
        terms = self.A / self.scale**self.alpha + self.B * self.scale**self.beta
        return 6 * (terms / (loss - self.E)) ** (1 / power)

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Tokens after which a model reaches the loss; infinite where it never does."""
        left = loss - self.E - self.A / parameters**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def parameters_for_tokens(self, tokens: float) -> float:
        """Weights of the model for which so many tokens are the best."""
        return self.scale * (tokens * self.scale) ** (self.beta / self.alpha)

    def tokens_for_parameters(self, parameters: float) -> float:
        """Tokens that are the best for a model."""
        return (parameters / self.scale) ** (self.alpha / self.beta) / self.scale

    def interval(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Where 90 % of such runs end: the law's own uncertainty and that of a run about it."""
        center, wide = self.loss(parameters, tokens), 1.645 * self.spread
        if not self.bootstrap:
            return center * math.exp(-wide), center * math.exp(wide)
        refits = sorted(math.log(_loss(one, parameters, tokens)) for one in self.bootstrap)
        low, high = (refits[round(share * (len(refits) - 1))] for share in (0.05, 0.95))
        at = math.log(center)
        down, up = math.hypot(max(0.0, at - low), wide), math.hypot(max(0.0, high - at), wide)
        return math.exp(at - down), math.exp(at + up)


def _loss(law: Numbers, parameters: float, tokens: float) -> float:
    a, b, floor, alpha, beta = law
    return floor + a / parameters**alpha + b / tokens**beta


@dataclass(frozen=True)
class PowerLaw:
    """N = coefficient x C^exponent, or the same of D; nothing is said of the loss."""

    name: str
    coefficient: float
    exponent: float
    source: str
    note: str = ""
    of_tokens: bool = False

    def optimum(self, flops: float) -> BudgetSplit:
        """The split of C = 6 N D."""
        found = self.coefficient * flops**self.exponent
        other = flops / 6 / found
        return BudgetSplit(other, found) if self.of_tokens else BudgetSplit(found, other)


def chinchilla(name: str, a: float, b: float, e: float, alpha: float, beta: float, note: str = "") -> LossLaw:
    """Approach 3, from the logarithms of A, B and E."""
    source = "Hoffmann et al. 2022, arXiv:2203.15556, approach 3"
    return LossLaw(name, math.exp(a), math.exp(b), math.exp(e), alpha, beta, source, note)


def _gadre(text: str, a: float, b: float, power: float, floor: float) -> LossLaw:
    """E + a N^power + b 6^(power/2) D^power, as its code has it: M tokens a weight, N M = D."""
    source = "Gadre et al. 2024, arXiv:2403.08540, fitted to the losses that it published"
    return LossLaw(f"gadre-{text}", a, b * 6 ** (power / 2), floor, -power, -power, source, f"{text} text")


EPOCH = LossLaw(
    "epoch",
    482.01,
    2085.43,
    1.8172,
    0.3478,
    0.3658,
    "Besiroglu et al. 2024, arXiv:2404.10102: approach 3 of Chinchilla, fitted again to 240 of its runs",
    "MassiveText; runs up to 1.3e22 FLOPs",
)
MUENNIGHOFF = LossLaw(
    "muennighoff",
    math.exp(6.255414),
    math.exp(7.3049974),
    math.exp(0.6254804),
    0.3526596,
    0.3526596,
    "Muennighoff et al. 2023, arXiv:2305.16264",
    "C4 text; the law of repeated data",
)
LAWS: Mapping[str, LossLaw | PowerLaw] = {
    law.name: law
    for law in (
        EPOCH,
        chinchilla(
            "chinchilla-3", 6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083, "unrounded, from the paper's source"
        ),
        chinchilla(
            "chinchilla-3-rounded",
            math.log(406.4),
            math.log(410.7),
            math.log(1.69),
            0.34,
            0.28,
            "as printed: at 5.76e23 FLOPs rounding moves the optimum from 40B to 32B weights; do not plan with it",
        ),
        PowerLaw(
            "chinchilla-1",
            0.0992,
            0.4981,
            "Hoffmann et al. 2022, table 3, approach 1",
            "a line through the table's rows, within 1.3 %",
        ),
        PowerLaw(
            "chinchilla-2",
            0.1449,
            0.4899,
            "Hoffmann et al. 2022, table A3, approach 2",
            "a line through the table's rows, within 3.3 %",
        ),
        PowerLaw(
            "chinchilla-3-table",
            0.53462,
            0.458657,
            "Hoffmann et al. 2022, table A3, approach 3",
            "a line through the table's rows, within 3.9 %; its row of 175B prints 1.26e24 FLOPs for 1.26e25",
        ),
        MUENNIGHOFF,
        _gadre("c4", 113.7, 189.5, -0.2425, 1.508),
        _gadre("redpajama", 166.2, 366.7, -0.2729, 1.837),
        _gadre("refinedweb", 125.1, 246.2, -0.2544, 1.734),
        PowerLaw("porian", 0.1189, 0.4969, "Porian et al. 2024, arXiv:2406.19146, tuned, RefinedWeb"),
        PowerLaw(
            "deepseek",
            5.8316,
            0.4757,
            "Bi et al. 2024, arXiv:2401.02954, equation 4",
            "its C has attention and no embedding",
            of_tokens=True,
        ),
        PowerLaw(
            "llama3",
            0.29,
            0.5378,
            "Llama team 2024, arXiv:2407.21783, section 3.2.1",
            "its law of tokens; the printed exponent 0.53 gives 10.46T tokens at 3.8e25 FLOPs, the paper says 16.55T",
            of_tokens=True,
        ),
        PowerLaw(
            "kaplan",
            1.3e9 / PF_DAY**0.73,
            0.73,
            "Kaplan et al. 2020, arXiv:2001.08361, table 6",
            "history: without the embedding, and not tuned at small sizes (arXiv:2406.19146); its scale was not "
            "checked against the paper; do not plan with it",
        ),
    )
}


def find_law(name: str) -> LossLaw:
    """Return a law of the loss by its name. Raises UserError, with the nearest names."""
    law = LAWS.get(name)
    if isinstance(law, LossLaw):
        return law
    known = [one.name for one in LAWS.values() if isinstance(one, LossLaw)]
    what = f"{name!r} splits a budget but says nothing of the loss" if law else f"no law {name!r} is known"
    raise UserError(
        what, where="--law", remedy=f"laws of the loss: {', '.join(known)}; or FILE.toml of `minka plan fit`"
    )
