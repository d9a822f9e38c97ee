"""The doctor says what will run, passes a recipe that is fit, and names what is wrong with one that is not."""

import json
from pathlib import Path

from commands import minka, written
from minka.plan.errors import ExitStatus
from tiny import tiny


def test_without_a_recipe_it_describes_the_machine() -> None:
    done = minka("doctor", "--json")
    assert done.returncode == ExitStatus.DONE, done.stderr
    machine = json.loads(done.stdout)["machine"]
    assert {"processor", "memory", "packages", "not installed", "collectives", "attention"} <= set(machine)
    assert "torch 2." in machine["packages"]


def test_a_fit_recipe_passes_every_check(tmp_path: Path) -> None:
    done = minka("doctor", str(written(tiny(tmp_path, optimizer={"learning_rate": 1e-2}))), "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert all(check["passed"] for check in checks.values()), checks
    assert done.returncode == ExitStatus.DONE
    assert len(checks) == 6


def test_a_learning_rate_that_diverges_is_named(tmp_path: Path) -> None:
    done = minka("doctor", str(written(tiny(tmp_path, optimizer={"learning_rate": 3.0}))), "--json")
    assert done.returncode == ExitStatus.FAILED
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    assert "the learning rate is below the one that diverges" in failed


def test_a_model_too_large_for_this_machine_is_refused() -> None:
    done = minka("doctor", "llama3-405b")
    assert done.returncode == ExitStatus.REFUSED
    assert "GiB" in done.stderr
    assert "Traceback" not in done.stderr
