"""A budget whose MFU is that of its own run: the fastest layout that fits is searched, and the budget planned again."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from minka.plan.budget_plan import FREE, Wishes, budget_plan
from minka.plan.compute_budget import BudgetAsked, BudgetMachine, Goal
from minka.plan.emit_run import data_section, run_of
from minka.plan.errors import UserError
from minka.plan.layout_search import search
from minka.plan.load_config import validate
from minka.plan.memory import peak_or_more

ROUNDS, NEAR = 4, 0.01  # at most, and how little the MFU then moves


def budget_with_layout(
    asked: BudgetAsked, machine: BudgetMachine, goal: Goal, wishes: Wishes = FREE
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plan, and the layout of its run: settings of the section. Raises UserError where no layout fits."""
    cluster = machine.cluster
    if cluster is None:
        raise UserError("a layout's own MFU needs a machine", where="--mfu", remedy="add --gpu, or give a number")
    for _ in range(ROUNDS):
        found = budget_plan(asked, machine, goal, wishes)
        layout, seconds = layout_of(found, machine)
        speed = found["batch_tokens"]["value"] / seconds / machine.gpus
        mfu = 6 * found["parameters"] * speed / cluster.peak_flops
        if abs(mfu / machine.mfu - 1) < NEAR:
            break
        machine = machine._replace(mfu=mfu)
    return found, layout


def layout_of(found: Mapping[str, Any], machine: BudgetMachine) -> tuple[dict[str, Any], float]:
    """Return settings of the fastest layout that fits, and a step's seconds under it. Raises UserError."""
    if machine.cluster is None:
        return {}, 0.0
    config = validate(run_of(found, "budget", data_section("demo")), "the run of this budget")
    peak = partial(peak_or_more, device_kind=machine.cluster.device_kind)
    best = search(config, machine.gpus, machine.cluster, 1, peak).found[0]
    return best.layout.model_dump(mode="json", exclude_defaults=True), best.time.seconds
