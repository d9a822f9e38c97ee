"""Rates fitted to steps: planted ones are found again, and published steps are predicted from others."""

from dataclasses import replace

import pytest

from minka.benchmarks.plan_accuracy import left_out, mean
from minka.benchmarks.published_steps import h100, megatron_steps, mpt_steps
from minka.plan.calibrate import Measured, calibrate, errors
from minka.plan.errors import UserError
from minka.plan.flops import training_flops_per_token
from minka.plan.machine import Machine, find_machine
from minka.plan.step_time import step_time
from minka.plan.step_work import Job

MPT = list(mpt_steps())


def timed(machine: Machine, jobs: list[Job]) -> list[Measured]:
    return [Measured(job, step_time(job, machine).seconds) for job in jobs]


def test_planted_rates_are_found_again() -> None:
    machine = find_machine("H100-SXM")
    planted = replace(machine.rates, matrix=0.6, attention=0.28, memory=0.55, link=0.6)
    steps = timed(replace(machine, rates=planted), [one.step.job for one in MPT])
    found = calibrate(machine, steps, "planted")
    assert mean(errors(found, steps)) < 0.01
    for key in ("matrix", "attention", "memory"):
        assert getattr(found.rates, key) == pytest.approx(getattr(planted, key), rel=0.1)
    assert found.rates.described() == "calibrated on planted"
    assert machine.rates.described() == "not calibrated"


def test_a_rate_that_no_step_depends_on_stays() -> None:
    machine = find_machine("H100-SXM")
    found = calibrate(machine, [one.step for one in MPT if one.gpus == 8], "one host")
    assert found.rates.network == pytest.approx(machine.rates.network)


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(UserError, match="no measured step"):
        calibrate(find_machine("H100-SXM"), [], "nothing")


def test_mpts_mfu_is_reproduced() -> None:
    """By 6N + 12Lds and 989 TFLOP/s: the 95th percentile of the error is below 0.1 %."""
    off = []
    for one in MPT:
        shape, job = one.step.job.part.shape, one.step.job
        flops = training_flops_per_token(shape, job.part.seq_len, "palm")
        tokens = job.part.tokens * job.micro_batches / one.step.seconds
        off.append(abs(tokens * flops / 989e12 / one.mfu - 1))
    assert sorted(off)[int(0.95 * len(off))] <= 0.001


@pytest.mark.parametrize("group", ["model", "gpus"])
def test_mpts_steps_are_predicted_from_others(group: str) -> None:
    """Whole sizes, and whole numbers of GPUs, left out: at most half the error of a constant MFU, and 6 %."""
    ours, constant = left_out(MPT, lambda one: getattr(one, group))
    print(f"leaving out each {group}: {ours:.2%}, a constant MFU {constant:.2%}")
    assert ours <= constant / 2
    assert ours <= 0.06


def test_megatrons_steps_are_predicted_from_three() -> None:
    """The smallest, the middle and the largest model: 3.5 % on the other six."""
    steps = [one.step for one in megatron_steps()]
    ends = (0, len(steps) // 2, len(steps) - 1)
    machine = calibrate(h100("fa2"), [steps[at] for at in ends], "three")
    off = mean(errors(machine, [step for at, step in enumerate(steps) if at not in ends]))
    print(f"the other six: {off:.2%}")
    assert off <= 0.035
