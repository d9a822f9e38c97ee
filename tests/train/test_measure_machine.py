"""`minka doctor --machine`: what it measures can be planned with."""

from pathlib import Path

from commands import minka
from minka.plan.cluster import read_cluster
from minka.plan.load_config import load_run
from minka.plan.time_plan import time_plan


def test_this_machine_is_measured_and_planned_with(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    done = minka("doctor", "--machine", str(path))
    assert done.returncode == 0, done.stderr
    cluster = read_cluster(path)
    assert cluster.cores >= 1
    assert 1e8 < cluster.peak_flops < 1e13
    assert 1e8 < cluster.bandwidth_tb * 1e12 < 1e13
    assert cluster.together >= 1
    assert 0 < cluster.rates.message_seconds < 1
    one, two = (time_plan(load_run("demo").config, ranks, cluster)["step_seconds"] for ranks in (1, 2))
    assert 0 < two < 1.5 * one


def test_a_run_and_a_machine_are_not_measured_together(tmp_path: Path) -> None:
    done = minka("doctor", "demo", "--machine", str(tmp_path / "machine.toml"))
    assert done.returncode == 2
    assert "--machine" in done.stderr
