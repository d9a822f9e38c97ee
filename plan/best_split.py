"""The best weights and tokens where the plain optimum does not hold: for data that repeats, and for much use."""

import math
from collections.abc import Callable
from typing import NamedTuple

from minka.plan.errors import UserError
from minka.plan.loss_laws import MUENNIGHOFF, BudgetSplit, LossLaw

GOLDEN = (math.sqrt(5) - 1) / 2


def minimum(function: Callable[[float], float], low: float, high: float, steps: int = 90) -> float:
    """Return where a function of one valley on [low, high] is least, by golden sections: to 1e-8 of its own width."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


class RepeatedData(NamedTuple):
    """What a token is worth that was seen before (Muennighoff et al. 2023, arXiv:2305.16264, equation 5).

    repeats_of_tokens, repeats_of_weights: R_D* and R_N*; a repetition is worth 1/e of new data after so many.
    """

    law: LossLaw = MUENNIGHOFF
    repeats_of_tokens: float = 15.387756
    repeats_of_weights: float = 5.309743

    def loss(self, parameters: float, tokens: float, unique: float) -> float:
        """Nats a token, of `tokens` of which `unique` differ."""
        if tokens <= unique:
            return self.law.loss(parameters, tokens)
        needed = min(parameters, self.law.parameters_for_tokens(unique))
        return self.law.loss(
            _worth(parameters, needed, self.repeats_of_weights), _worth(tokens, unique, self.repeats_of_tokens)
        )

    def optimum(self, flops: float, unique: float) -> BudgetSplit:
        """The split with the lowest loss."""
        plain = self.law.optimum(flops)
        if plain.tokens <= unique:
            return plain
        return least_loss(lambda parameters, tokens: self.loss(parameters, tokens, unique), flops, plain.parameters)


def least_loss(
    loss: Callable[[float, float], float], flops: float, near: float, inference_tokens: float = 0.0
) -> BudgetSplit:
    """Return the split of the lowest loss whose training and use take `flops`: 6 N D + 2 N x inference_tokens.

    near: weights that are best without repeated data and without use, which both make models smaller.
    """
    most = flops / (2 * inference_tokens) * (1 - 1e-9) if inference_tokens else math.inf
    top = math.log(min(near * 1.5, most))

    def tokens(parameters: float) -> float:
        return (flops / (2 * parameters) - inference_tokens) / 3

    found = math.exp(minimum(lambda x: loss(math.exp(x), tokens(math.exp(x))), top - 12, top))
    return BudgetSplit(found, tokens(found))


def _worth(count: float, unique: float, repeats: float) -> float:
    """Of new ones, how many are worth as much."""
    return unique + unique * repeats * -math.expm1(-(count / unique - 1) / repeats)


class WithInference(NamedTuple):
    """The least FLOPs of training and use together (Sardana et al. 2024, arXiv:2401.00448): 6 N D + 2 N D_inference."""

    law: LossLaw
    inference_tokens: float

    def flops(self, split: BudgetSplit) -> float:
        """Of training and of use."""
        return 2 * split.parameters * (3 * split.tokens + self.inference_tokens)

    def for_loss(self, loss: float) -> BudgetSplit:
        """The cheapest model that reaches the loss. Raises UserError for one that no model reaches."""
        best = self.law.optimum(self.law.flops_for(loss))
        least = (self.law.A / (loss - self.law.E)) ** (1 / self.law.alpha)  # weights that get there with endless data

        def cost(x: float) -> float:
            parameters = math.exp(x)
            return math.log(self.flops(BudgetSplit(parameters, self.law.tokens_for(parameters, loss))))

        parameters = math.exp(minimum(cost, math.log(least * (1 + 1e-9)), math.log(best.parameters)))
        return BudgetSplit(parameters, self.law.tokens_for(parameters, loss))


def check_epochs(epochs: float, most: float) -> str:
    """Return what to say about so many passes over the data; "" for few. Raises UserError for more than `most`."""
    if epochs > most:
        what = f"the tokens are {epochs:.1f} passes over the unique ones"
        why = "beyond about 16 a repeated token is worth little, and may hurt (arXiv:2305.16264, 2605.01640)"
        remedy = f"find more data, spend less, or say --most-epochs {math.ceil(epochs)}"
        raise UserError(what, where="--unique-tokens", why=why, remedy=remedy)
    if epochs > 4:
        return f"{epochs:.1f} passes over the unique tokens: from about 4 on they are worth less than new ones"
    return ""
