"""The doctor describes the machine, passes a sound recipe, and names the check that an unsound one fails."""

import json
from pathlib import Path

import pytest

from commands import minka, written
from minka.parallel.choose_kernels import kernels_of
from minka.parallel.mesh import start_mesh
from minka.plan.errors import ExitStatus
from minka.train.command import main
from minka.train.doctor import this_machine
from tiny import tiny


def test_without_a_recipe_it_describes_the_machine() -> None:
    done = minka("doctor", "--json")
    assert done.returncode == ExitStatus.DONE, done.stderr
    machine = json.loads(done.stdout)["machine"]
    assert {"processor", "memory", "packages", "not installed", "collectives", "attention"} <= set(machine)
    assert "torch 2." in machine["packages"]


def test_it_says_what_a_run_stores_and_computes_in(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "weights": "bf16", "moments": "bf16"}
    machine = this_machine(tiny(tmp_path, optimizer=optimizer))
    assert machine["compute"] == "fp32 on bf16 weights, bf16 moments"
    assert this_machine(None)["compute"] == "fp32 on fp32 weights, fp32 moments"
    wide = this_machine(tiny(tmp_path, layout={"precision": "fp64"}))
    assert wide["compute"] == "fp64 on fp64 weights, fp64 moments"
    assert wide["rms_norm"] == "torch (there is no GPU)"


def test_it_warns_of_what_runs_otherwise_than_asked_for_in_the_words_of_a_run(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "weights": "bf16"}
    config = tiny(tmp_path, optimizer=optimizer, kernels={"attention": "varlen"})
    with start_mesh(config.layout) as mesh:
        said = kernels_of(config, mesh).fallbacks
    assert this_machine(config)["warnings"] == ". ".join(said)
    assert "sdpa runs instead of varlen for attention" in said[0]
    assert "many times slower" in said[1]
    assert "warnings" not in this_machine(None)


def test_a_dry_run_says_what_a_different_machine_may_replace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--dry-run", "kernels.attention=varlen"]) == ExitStatus.DONE
    assert "# kernels: attention (varlen) run where the machine can" in capsys.readouterr().out
    assert main(["demo", "--dry-run"]) == ExitStatus.DONE
    assert "# kernels" not in capsys.readouterr().out


def test_a_sound_recipe_passes_every_check(tmp_path: Path) -> None:
    done = minka("doctor", str(written(tiny(tmp_path, optimizer={"learning_rate": 1e-2}))), "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert all(check["passed"] for check in checks.values()), checks
    assert done.returncode == ExitStatus.DONE
    assert len(checks) == 6


@pytest.mark.slow
def test_a_learning_rate_that_diverges_fails_its_check(tmp_path: Path) -> None:
    done = minka("doctor", str(written(tiny(tmp_path, optimizer={"learning_rate": 3.0}))))
    assert done.returncode == ExitStatus.FAILED
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any("learning rate" in line for line in failed), done.stdout


def test_a_model_too_large_for_this_machine_is_refused() -> None:
    done = minka("doctor", "llama3-405b", "--json")
    assert done.returncode == ExitStatus.REFUSED
    error = json.loads(done.stdout)
    assert (error["where"], "GiB" in error["error"]) == ("model", True)
    assert "Traceback" not in done.stderr
