"""A budget is the same however it is said, and what cannot be planned is refused with what would work."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minka.plan.budget_plan import Wishes, budget_plan
from minka.plan.cluster import find_cluster
from minka.plan.compute_budget import BudgetAsked, BudgetMachine, Goal, check_machine
from minka.plan.errors import UserError
from minka.plan.flops import Shape, parameters
from minka.plan.loss_laws import EPOCH, find_law
from minka.plan.shape_of_size import shape_of_size, usual_vocab

H100 = BudgetMachine(find_cluster("H100-SXM"), gpus=64, mfu=0.4, dollars_per_hour=2.5)
GOAL = Goal(EPOCH)


@settings(max_examples=15)
@given(st.floats(15, 25))
def test_one_budget_is_one_plan_in_flops_hours_dollars_and_days(exponent: float) -> None:
    flops = 10**exponent
    hours = flops / (989.5e12 * 0.4 * 3600)
    ways = (
        BudgetAsked(flops=flops),
        BudgetAsked(gpu_hours=hours),
        BudgetAsked(dollars=hours * 2.5),
        BudgetAsked(days=hours / 24 / 64),
    )
    plans = [budget_plan(asked, H100, GOAL) for asked in ways]
    for plan in plans[1:]:
        assert plan["shape"] == plans[0]["shape"]
        for key in ("tokens", "flops", "loss", "gpu_hours", "days", "dollars", "kwh"):
            assert plan[key] == pytest.approx(plans[0][key], rel=1e-9, abs=1)
    assert plans[0]["flops"] == pytest.approx(flops, rel=1e-9)
    assert plans[0]["gpu_hours"] == pytest.approx(hours, rel=1e-9)


@settings(max_examples=20)
@given(st.floats(15, 26), st.floats(0.02, 2))
def test_more_budget_never_raises_the_predicted_loss(exponent: float, more: float) -> None:
    """Of what is planned: shapes are rounded, which must not cost more than the budget gains."""
    small, large = (budget_plan(BudgetAsked(flops=10**x), BudgetMachine(), GOAL) for x in (exponent, exponent + more))
    assert large["loss"] <= small["loss"]


@settings(max_examples=40)
@given(st.floats(4, 12))
def test_a_shape_is_near_its_size_and_can_be_cut(exponent: float) -> None:
    size = 10**exponent
    shape = shape_of_size(size)
    assert parameters(shape) == pytest.approx(size, rel=0.25 if size < 1e6 else 0.12)
    assert shape.heads * shape.head_dim == shape.d_model
    assert shape.heads % shape.kv_heads == 0
    if shape.d_model >= 4096:
        assert shape.heads % 8 == shape.kv_heads % 8 == shape.d_ff % 256 == shape.layers % 4 == 0
        assert 60 <= shape.d_model / shape.layers <= 180


def test_what_a_plan_has() -> None:
    plan = budget_plan(BudgetAsked(flops=5.76e23), H100, GOAL)
    assert plan["parameters"] == parameters(Shape(**plan["shape"]))
    assert 60e9 < plan["parameters"] < 85e9
    assert plan["parameters"] * plan["tokens"] * 6 == pytest.approx(5.76e23, rel=1e-9)
    low, high = plan["loss_interval"]
    assert low < plan["loss"] < high
    names = [one["law"] for one in plan["alternatives"]]
    assert {"chinchilla-1", "chinchilla-3-rounded", "llama3", "porian", "kaplan"} <= {*names}
    assert "epoch" not in names
    for key in ("batch_tokens", "learning_rate"):
        band = plan[key]
        assert band["low"] <= max(band["laws"].values())
        assert "arXiv" in band["source"]
    assert plan["kwh"] == pytest.approx(plan["gpu_hours"] * 0.7)
    assert plan["dollars"] == pytest.approx(plan["gpu_hours"] * 2.5)
    steps = plan["schedule"]["steps"] * plan["batch_tokens"]["value"]
    assert steps == pytest.approx(plan["tokens"], rel=0.01)


def test_goals_without_a_budget() -> None:
    by_size = budget_plan(BudgetAsked(parameters=1e9), BudgetMachine(), GOAL)
    assert by_size["tokens_per_parameter"] == pytest.approx(20, rel=0.2)
    by_tokens = budget_plan(BudgetAsked(tokens=by_size["tokens"]), BudgetMachine(), GOAL)
    assert by_tokens["parameters"] == pytest.approx(by_size["parameters"], rel=0.1)
    both = budget_plan(BudgetAsked(parameters=8e9, tokens=15e12), BudgetMachine(), GOAL)
    assert both["tokens"] == 15e12
    by_loss = budget_plan(BudgetAsked(loss=2.2), BudgetMachine(), GOAL)
    assert by_loss["loss"] == pytest.approx(2.2, rel=1e-9)
    small = budget_plan(BudgetAsked(loss=2.2, parameters=by_loss["parameters"] / 2), BudgetMachine(), GOAL)
    assert small["loss"] == pytest.approx(2.2, rel=1e-9)
    assert small["flops"] > by_loss["flops"]
    sized = budget_plan(BudgetAsked(flops=1e21, parameters=1e9), BudgetMachine(), GOAL)
    assert sized["flops"] == pytest.approx(1e21)


def test_use_after_training_makes_a_smaller_model() -> None:
    plain = budget_plan(BudgetAsked(flops=1e23), BudgetMachine(), GOAL)
    used = budget_plan(BudgetAsked(flops=1e23), BudgetMachine(), Goal(EPOCH, inference_tokens=1e12))
    assert used["parameters"] < plain["parameters"]
    assert used["flops"] + used["inference_flops"] == pytest.approx(1e23)
    same = budget_plan(BudgetAsked(loss=2.0), BudgetMachine(), Goal(EPOCH, inference_tokens=1e12))
    assert same["parameters"] < budget_plan(BudgetAsked(loss=2.0), BudgetMachine(), GOAL)["parameters"]


def test_few_unique_tokens_make_a_smaller_model_and_a_warning() -> None:
    goal = Goal(find_law("muennighoff"), unique_tokens=25e9)
    plan = budget_plan(BudgetAsked(flops=1e22), BudgetMachine(), goal)
    assert plan["epochs"] == pytest.approx(9.49, rel=0.05)
    assert any("passes over the unique tokens" in note for note in plan["notes"])
    plain = budget_plan(BudgetAsked(flops=1e22), BudgetMachine(), goal._replace(unique_tokens=0.0))
    assert plan["parameters"] < plain["parameters"]
    assert plan["loss"] > plain["loss"]
    with pytest.raises(UserError) as refused:
        budget_plan(BudgetAsked(flops=1e24), BudgetMachine(), goal)
    assert "--most-epochs" in str(refused.value)
    assert budget_plan(BudgetAsked(flops=1e24), BudgetMachine(), goal, Wishes(most_epochs=200))["epochs"] > 16


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "a budget is missing"),
        ({"flops": -1.0}, "--flops"),
        ({"days": math.nan}, "--days"),
        ({"flops": 1e20, "days": 3.0}, "contradict"),
        ({"flops": 1e20, "loss": 2.0}, "contradict"),
        ({"flops": 1e20, "parameters": 1e9, "tokens": 1e9}, "leave nothing to plan"),
        ({"loss": 1.7}, "1.817"),
        ({"loss": 2.0, "parameters": 1e6}, "weights do"),
        ({"loss": 2.0, "tokens": 1e6}, "tokens do"),
        ({"gpu_hours": 1.0}, "--gpu H100-SXM"),
        ({"dollars": 1.0}, "--price-per-gpu-hour"),
        ({"flops": 10.0}, "--vocab"),
        ({"flops": 1e40}, "no architecture"),
    ],
)
def test_what_cannot_be_planned(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        budget_plan(BudgetAsked(**asked), BudgetMachine(), GOAL)
    assert said in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("machine", "goal", "where"),
    [
        (BudgetMachine(mfu=40.0), GOAL, "--mfu"),
        (BudgetMachine(mfu=0.0), GOAL, "--mfu"),
        (BudgetMachine(dollars_per_hour=-1.0), GOAL, "--price-per-gpu-hour"),
        (BudgetMachine(), Goal(EPOCH, unique_tokens=-1.0), "--unique-tokens"),
        (BudgetMachine(), Goal(EPOCH, inference_tokens=math.inf), "--inference-tokens"),
    ],
)
def test_numbers_out_of_range(machine: BudgetMachine, goal: Goal, where: str) -> None:
    with pytest.raises(UserError) as refused:
        check_machine(machine, goal)
    assert refused.value.where == where


def test_a_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        budget_plan(BudgetAsked(flops=1e20), BudgetMachine(), GOAL, Wishes(vocab=1))
    assert refused.value.where == "--vocab"


def test_what_is_far_from_the_laws_is_said() -> None:
    small = " ".join(budget_plan(BudgetAsked(flops=1e13), BudgetMachine(), GOAL)["notes"])
    assert "above that of guessing" in small
    assert "an extrapolation" in small
    long = budget_plan(BudgetAsked(parameters=8e9, tokens=15e12), BudgetMachine(), GOAL)
    assert any("span a factor of" in note for note in long["notes"])
    assert long["asked"] == ["parameters", "tokens"]
    assert budget_plan(BudgetAsked(flops=1e21), BudgetMachine(), GOAL)["notes"] == []


def test_a_vocabulary_does_not_take_a_small_model() -> None:
    for size in (1e4, 1e5, 1e6, 1e7, 1e9):
        shape = shape_of_size(size)
        assert shape.vocab == usual_vocab(size)
        assert shape.vocab * shape.d_model < 0.8 * parameters(shape)
