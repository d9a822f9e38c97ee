"""A run that was planned: its plan is written before the first step, is told, and outlives a resume."""

import json
from pathlib import Path

from minka.plan.command import main
from minka.plan.outlook import plan_hash
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank


def test_the_plan_is_kept_as_it_was_when_the_run_began(tmp_path: Path) -> None:
    plan = {"law": "epoch", "loss": 5.0, "loss_low": 4.5, "loss_high": 5.5}
    config = tiny(tmp_path, run={"name": "planned", "max_steps": 6}, plan=plan)
    assert on_ranks(train_rank, 1, config) == [0]
    file = RunFolder.of(config).path / "plan.json"
    kept = json.loads(file.read_text())
    assert (kept["law"], kept["loss"], kept["loss_interval"]) == ("epoch", 5.0, [4.5, 5.5])
    assert kept["hash"] == plan_hash(config, kept)
    longer = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": 8})})
    later = longer.model_copy(update={"plan": config.plan.model_copy(update={"loss": 6.0})})
    assert on_ranks(train_rank, 1, later, "run.max_steps") == [0]
    assert json.loads(file.read_text()) == kept
    assert main(["score", str(file.parent)]) == 0
    assert main(["check", str(file.parent)]) == 0


def test_a_run_without_a_plan_has_none(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"name": "free", "max_steps": 5})
    assert on_ranks(train_rank, 1, config) == [0]
    assert not (RunFolder.of(config).path / "plan.json").exists()
