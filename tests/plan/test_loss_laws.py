"""Scaling laws give the tables and figures of their papers, and their optimum is the best there is."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minka.plan.best_split import RepeatedData, WithInference, check_epochs, least_loss, minimum
from minka.plan.errors import UserError
from minka.plan.loss_laws import EPOCH, LAWS, BudgetSplit, LossLaw, find_law

M, B, T = 1e6, 1e9, 1e12
# Weights; FLOPs and tokens by approaches 1, 2 and 3 (Hoffmann et al. 2022, tables 3 and A3).
TABLE: tuple[Any, ...] = (
    (400 * M, (1.92e19, 8.0 * B), (1.84e19, 7.7 * B), (2.21e19, 9.2 * B)),
    (1 * B, (1.21e20, 20.2 * B), (1.20e20, 20.0 * B), (1.62e20, 27.1 * B)),
    (10 * B, (1.23e22, 205.1 * B), (1.32e22, 219.5 * B), (2.46e22, 410.1 * B)),
    (67 * B, (5.76e23, 1.5 * T), (6.88e23, 1.7 * T), (1.71e24, 4.1 * T)),
    (175 * B, (3.85e24, 3.7 * T), (4.54e24, 4.3 * T), (1.26e25, 12.0 * T)),  # printed: 1.26e24
    (280 * B, (9.90e24, 5.9 * T), (1.18e25, 7.1 * T), (3.52e25, 20.1 * T)),
    (520 * B, (3.43e25, 11.0 * T), (4.19e25, 13.4 * T), (1.36e26, 43.5 * T)),
    (1 * T, (1.27e26, 21.2 * T), (1.59e26, 26.5 * T), (5.65e26, 94.1 * T)),
    (10 * T, (1.30e28, 216.2 * T), (1.75e28, 292.0 * T), (8.55e28, 1425.5 * T)),
)
WITHIN = {"chinchilla-1": 0.013, "chinchilla-2": 0.033, "chinchilla-3-table": 0.039}
LOSS_LAWS = [law for law in LAWS.values() if isinstance(law, LossLaw)]


@pytest.mark.parametrize(("column", "name"), [*enumerate(WITHIN)])
def test_chinchillas_tables(column: int, name: str) -> None:
    for size, *columns in TABLE:
        flops, tokens = columns[column]
        assert LAWS[name].optimum(flops).parameters == pytest.approx(size, rel=WITHIN[name])
        if column == 0:
            rounded = 0.05 if size == 67 * B else 0.01  # its tokens are printed with two digits
            assert tokens * 6 * size == pytest.approx(flops, rel=rounded)


def test_the_misprint_of_table_a3_is_known() -> None:
    assert pytest.approx(1.26e25, rel=0.01) == 6 * 175 * B * 12.0 * T
    assert "1.26e24" in LAWS["chinchilla-3-table"].note


def test_rounded_exponents_move_the_optimum() -> None:
    unrounded, rounded = (LAWS[name].optimum(5.76e23) for name in ("chinchilla-3", "chinchilla-3-rounded"))
    assert unrounded.parameters == pytest.approx(40 * B, rel=0.02)
    assert rounded.parameters == pytest.approx(32 * B, rel=0.02)
    assert (unrounded.tokens / unrounded.parameters, rounded.tokens / rounded.parameters) == pytest.approx(
        (59, 93), rel=0.01
    )


def test_the_refit_of_approach_3() -> None:
    assert EPOCH.exponent == pytest.approx(0.513, abs=5e-4)
    split = EPOCH.optimum(5.76e23)
    assert 18 < split.tokens / split.parameters < 22


def test_llama_3s_printed_exponent_is_known() -> None:
    law = LAWS["llama3"]
    assert law.optimum(3.8e25).tokens == pytest.approx(16.55 * T, rel=2e-3)
    assert pytest.approx(10.46 * T, rel=1e-3) == 0.29 * 3.8e25**0.53
    assert "10.46T" in law.note


def test_deepseeks_law_splits_all_of_a_budget() -> None:
    """Its law of FLOPs a token and that of tokens multiply to the budget, to the digits printed."""
    for flops in (1e18, 1e20, 8.4e22, 1e24):
        assert 0.1715 * flops**0.5243 * LAWS["deepseek"].optimum(flops).tokens == pytest.approx(flops, rel=2e-4)


def test_gadres_law_is_its_code() -> None:
    """E + a N^b + c 6^(b/2) (M N)^b, with M tokens a weight."""
    law = find_law("gadre-c4")
    for size, multiple in ((1.4e9, 640), (6.9e9, 20)):
        expected = 1.508 + 113.7 * size**-0.2425 + 189.5 * 6 ** (-0.2425 / 2) * (multiple * size) ** -0.2425
        assert law.loss(size, multiple * size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("law", LOSS_LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e15, 1e20, 5.76e23, 1e27])
def test_the_closed_form_is_the_optimum(law: LossLaw, flops: float) -> None:
    """Against every split on a fine grid around it, refined: to 1e-6."""
    split = law.optimum(flops)
    best, step = math.log(split.parameters) + 0.37, 3.0
    while step > 1e-12:
        around = [best + step * x / 10 for x in range(-10, 11)]
        best = min(around, key=lambda x: law.loss(math.exp(x), flops / 6 / math.exp(x)))
        step /= 5
    assert law.loss(*split) <= law.loss(math.exp(best), flops / 6 / math.exp(best)) * (1 + 1e-14)
    assert split.parameters * split.tokens * 6 == pytest.approx(flops, rel=1e-12)
    slope = _slope(law, split)
    assert abs(slope) < 1e-6


def _slope(law: LossLaw, split: BudgetSplit) -> float:
    """Of the loss over ln N at fixed FLOPs, relative to its two parts: by how much the optimum is off, about."""
    size, data = law.A / split.parameters**law.alpha * law.alpha, law.B / split.tokens**law.beta * law.beta
    return (data - size) / (data + size)


@pytest.mark.parametrize("law", LOSS_LAWS, ids=lambda law: law.name)
def test_inverses(law: LossLaw) -> None:
    for flops in (1e16, 1e21, 1e25):
        split = law.optimum(flops)
        loss = law.loss(*split)
        assert law.flops_for(loss) == pytest.approx(flops, rel=1e-9)
        assert law.tokens_for(split.parameters, loss) == pytest.approx(split.tokens, rel=1e-9)
        assert law.parameters_for_tokens(split.tokens) == pytest.approx(split.parameters, rel=1e-9)
        assert law.tokens_for_parameters(split.parameters) == pytest.approx(split.tokens, rel=1e-9)
        assert law.tokens_for(split.parameters / 1e6, loss) == math.inf


def test_muennighoffs_goldens() -> None:
    law = RepeatedData()
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-14)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-14)
    split = law.optimum(1e22, 25e9)
    assert split.parameters == pytest.approx(7.022e9, rel=1e-3)
    assert split.tokens == pytest.approx(237.3e9, rel=1e-3)
    assert split.tokens / 25e9 == pytest.approx(9.49, rel=1e-3)


def test_sardanas_golden() -> None:
    """13B of Chinchilla's quality with 2T tokens of use: train 7B, save 17 % and 1.7e22 FLOPs."""
    law = LossLaw("theirs", 406.4, 410.7, 1.69, 0.336, 0.283, "de Vries's exponents")
    plain = BudgetSplit(13e9, law.tokens_for_parameters(13e9))
    both = WithInference(law, 2e12)
    small = both.for_loss(law.loss(*plain))
    assert small.parameters == pytest.approx(7e9, rel=0.01)
    assert 1 - both.flops(small) / both.flops(plain) == pytest.approx(0.17, abs=0.01)
    assert both.flops(plain) - both.flops(small) == pytest.approx(1.7e22, rel=0.01)
    again = least_loss(law.loss, both.flops(small), plain.parameters, 2e12)  # the same, asked the other way round
    assert again.parameters == pytest.approx(small.parameters, rel=1e-5)


@given(st.floats(14, 27), st.floats(0.01, 3))
def test_a_larger_budget_never_has_a_higher_loss(exponent: float, more: float) -> None:
    for law in LOSS_LAWS:
        small, large = 10**exponent, 10 ** (exponent + more)
        assert law.loss(*law.optimum(large)) <= law.loss(*law.optimum(small))
        repeated = RepeatedData(law)
        losses = [repeated.loss(*repeated.optimum(flops, 1e9), 1e9) for flops in (small, large)]
        assert losses[1] <= losses[0] * (1 + 1e-9)


def test_repeated_data_is_worth_less_and_new_data_the_same() -> None:
    law = RepeatedData(EPOCH)
    assert law.loss(1e9, 20e9, 20e9) == EPOCH.loss(1e9, 20e9)
    losses = [law.loss(1e9, 20e9, unique) for unique in (20e9, 10e9, 5e9, 2e9)]
    assert losses == sorted(losses)
    assert losses[2] < losses[0] * 1.02  # four epochs are nearly free, ten are not
    assert losses[3] > losses[0] * 1.03


def test_minimum_finds_the_bottom_of_a_valley() -> None:
    assert minimum(lambda x: (x - 1.234) ** 2, -5, 9) == pytest.approx(1.234, abs=1e-7)


def test_passes_over_the_data() -> None:
    assert check_epochs(3.9, 16) == ""
    assert "4.5 passes" in check_epochs(4.5, 16)
    with pytest.raises(UserError) as refused:
        check_epochs(16.5, 16)
    assert "--most-epochs 17" in str(refused.value)


def test_an_interval_has_the_law_and_the_spread_of_runs() -> None:
    low, high = EPOCH.interval(1e9, 20e9)
    assert low < EPOCH.loss(1e9, 20e9) < high
    assert math.log(high / low) / 2 == pytest.approx(1.645 * 0.0075)
    refits = tuple((EPOCH.A, EPOCH.B, EPOCH.E + shift, EPOCH.alpha, EPOCH.beta) for shift in (-0.1, 0.0, 0.1))
    wider = LossLaw("own", EPOCH.A, EPOCH.B, EPOCH.E, EPOCH.alpha, EPOCH.beta, "", bootstrap=refits)
    assert wider.interval(1e9, 20e9)[0] < low
    assert wider.interval(1e9, 20e9)[1] > high


@pytest.mark.parametrize("name", ["epok", "kaplan", ""])
def test_a_law_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError) as refused:
        find_law(name)
    assert "epoch" in str(refused.value)
    assert ("says nothing of the loss" in str(refused.value)) == (name == "kaplan")


def test_a_loss_that_no_budget_reaches() -> None:
    with pytest.raises(UserError) as refused:
        EPOCH.flops_for(1.8)
    assert "1.817" in str(refused.value)
