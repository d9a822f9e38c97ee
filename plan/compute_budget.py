"""A budget in FLOPs, GPU-hours, dollars, days, tokens, weights or a loss, as the one thing they come to: 6 N D.

What one says of the other is exact, so that a budget gives one plan however it is said.
"""

import math
from typing import NamedTuple

from minka.plan.best_split import RepeatedData, WithInference, least_loss
from minka.plan.cluster import Cluster
from minka.plan.errors import UserError
from minka.plan.loss_laws import BudgetSplit, LossLaw

COMPUTE = ("flops", "gpu_hours", "dollars", "days")
GOALS = ("parameters", "tokens", "loss")
OPTIONS = {"gpu_hours": "--gpu-hours", "parameters": "--params"} | {
    name: f"--{name}" for name in ("flops", "dollars", "days", "tokens", "loss")
}
WHERE = "minka plan budget"


class BudgetAsked(NamedTuple):
    """What was said, each None where it was not; of COMPUTE and GOALS one, or two that leave nothing open."""

    flops: float | None = None  # 6 N D, and 2 N a token of use where there is use
    gpu_hours: float | None = None
    dollars: float | None = None
    days: float | None = None
    tokens: float | None = None
    parameters: float | None = None
    loss: float | None = None

    def given(self, names: tuple[str, ...]) -> list[str]:
        """Those of the names that were said."""
        return [name for name in names if getattr(self, name) is not None]


class BudgetMachine(NamedTuple):
    """What a GPU-hour is: on what, how many at once, at which share of the peak (of 6 N D), at what price."""

    cluster: Cluster | None = None
    gpus: int = 1
    mfu: float = 0.4
    dollars_per_hour: float | None = None

    @property
    def flops_per_hour(self) -> float:
        """Of one GPU. Raises UserError where it is not known which."""
        if self.cluster is None:
            remedy = "add --gpu H100-SXM, for example, or say the budget with --flops"
            raise UserError("on what it is spent is missing", where="--gpu", remedy=remedy)
        return self.cluster.peak_flops * self.mfu * 3600


def check_asked(asked: BudgetAsked) -> None:
    """Raises UserError for a budget that is missing, contradicts itself or is not above 0."""
    for name in (*COMPUTE, *GOALS):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{value:g}", where=OPTIONS[name], remedy="give a number above 0")
    compute, goals = asked.given(COMPUTE), asked.given(GOALS)
    said = " and ".join(OPTIONS[name] for name in (*compute, *goals))
    if len(compute) > 1:
        why = "each of them alone says how much there is"
        raise UserError(f"{said} are budgets that contradict each other", where=WHERE, why=why, remedy="give one")
    if len(compute) + len(goals) > 2:
        remedy = "give one, or one and --params or --tokens"
        raise UserError(f"{said} together leave nothing to plan", where=WHERE, remedy=remedy)
    if compute and "loss" in goals:
        why = "the budget says which loss is reached, and the loss which budget it takes"
        raise UserError(f"{said} contradict each other", where=WHERE, why=why, remedy="give one of them")
    if not compute and not goals:
        remedy = "give one of " + ", ".join(OPTIONS[name] for name in (*COMPUTE, *GOALS))
        raise UserError("a budget is missing", where=WHERE, remedy=remedy)


def flops_of(asked: BudgetAsked, machine: BudgetMachine) -> float | None:
    """Return the FLOPs that a budget of COMPUTE has; None for one of goals alone. Raises UserError."""
    if asked.flops is not None:
        return asked.flops
    hours = asked.gpu_hours
    if asked.days is not None:
        hours = asked.days * 24 * machine.gpus
    if asked.dollars is not None:
        if not machine.dollars_per_hour:
            remedy = "add --price-per-gpu-hour 2.5, for example"
            raise UserError("what an hour costs is missing", where="--price-per-gpu-hour", remedy=remedy)
        hours = asked.dollars / machine.dollars_per_hour
    return None if hours is None else hours * machine.flops_per_hour


class Goal(NamedTuple):
    """By what a split is judged: a law, tokens that differ (0: all do), tokens of use after training."""

    law: LossLaw
    unique_tokens: float = 0.0
    inference_tokens: float = 0.0

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        if self.unique_tokens:
            return RepeatedData(self.law).loss(parameters, tokens, self.unique_tokens)
        return self.law.loss(parameters, tokens)

    def tokens_left(self, flops: float, parameters: float) -> float:
        """Tokens that a model can be trained on, if use takes its part of the FLOPs."""
        return (flops / (2 * parameters) - self.inference_tokens) / 3

    def split(self, asked: BudgetAsked, flops: float | None) -> BudgetSplit:
        """The best weights and tokens. Raises UserError where there are none."""
        given = asked.given(GOALS)
        if flops is not None and not given:
            return self._best(flops)
        if flops is not None:
            return self._rest(asked, flops)
        if given == ["parameters", "tokens"] or given == ["tokens", "parameters"]:
            return BudgetSplit(float(asked.parameters or 0), float(asked.tokens or 0))
        if "loss" in given:
            return self._for_loss(asked)
        if asked.tokens is not None:
            return BudgetSplit(self.law.parameters_for_tokens(asked.tokens), asked.tokens)
        parameters = float(asked.parameters or 0)
        return BudgetSplit(parameters, self.law.tokens_for_parameters(parameters))

    def _best(self, flops: float) -> BudgetSplit:
        if not self.inference_tokens:
            return RepeatedData(self.law).optimum(flops, self.unique_tokens or math.inf)
        return least_loss(self.loss, flops, self.law.optimum(flops).parameters, self.inference_tokens)

    def _rest(self, asked: BudgetAsked, flops: float) -> BudgetSplit:
        """One of the two was said, and the budget has the other."""
        if asked.parameters is not None:
            split = BudgetSplit(asked.parameters, self.tokens_left(flops, asked.parameters))
        else:
            tokens = float(asked.tokens or 0)
            split = BudgetSplit(flops / (6 * tokens + 2 * self.inference_tokens), tokens)
        if split.tokens <= 0:
            what = f"using a model of {split.parameters:,.0f} weights takes more than the budget"
            raise UserError(what, where="--inference-tokens", remedy="spend more, or say a smaller --params")
        return split

    def _for_loss(self, asked: BudgetAsked) -> BudgetSplit:
        loss, law = float(asked.loss or 0), self.law
        cheapest = law.flops_for(loss)  # also refuses what no model reaches
        if self.unique_tokens:
            remedy = "leave --unique-tokens out, and compare the tokens with what there is"
            raise UserError("a loss from repeated data is not turned into a budget", where="--loss", remedy=remedy)
        if asked.parameters is not None:
            tokens = law.tokens_for(asked.parameters, loss)
            if tokens == math.inf:
                least = (law.A / (loss - law.E)) ** (1 / law.alpha)
                what = f"a model of {asked.parameters:,.0f} weights does not reach {loss:g}, however long it is trained"
                raise UserError(what, where="--params", remedy=f"more than {least:,.0f} weights do")
            return BudgetSplit(asked.parameters, tokens)
        if asked.tokens is not None:
            left = loss - law.E - law.B / asked.tokens**law.beta
            if left <= 0:
                least = (law.B / (loss - law.E)) ** (1 / law.beta)
                what = f"{asked.tokens:,.0f} tokens do not bring any model to {loss:g}"
                raise UserError(what, where="--tokens", remedy=f"more than {least:,.0f} tokens do")
            return BudgetSplit((law.A / left) ** (1 / law.alpha), asked.tokens)
        if self.inference_tokens:
            return WithInference(law, self.inference_tokens).for_loss(loss)
        return law.optimum(cheapest)


def check_machine(machine: BudgetMachine, goal: Goal) -> None:
    """Raises UserError for numbers that are out of range."""
    if not 0 < machine.mfu <= 1:
        raise UserError(
            f"{machine.mfu:g}", where="--mfu", remedy="give a share of the peak between 0 and 1, such as 0.4"
        )
    named = {
        "--price-per-gpu-hour": machine.dollars_per_hour or 0.0,
        "--unique-tokens": goal.unique_tokens,
        "--inference-tokens": goal.inference_tokens,
    }
    for where, value in named.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{value:g}", where=where, remedy="give a number above 0, or leave it out")


def read_number(text: str, where: str, wanted: str) -> float:
    """Return the number that a word is. Raises UserError."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number", where=where, remedy=f"give {wanted}") from None
