"""`minka plan score`: plans against what came of them, misses included."""

import json
from pathlib import Path
from typing import Any

import pytest

from measured_runs import learning_run, planned_run
from minka.plan.command import main


def scored(capsys: pytest.CaptureFixture[str], *runs: str) -> Any:
    assert main(["score", *runs, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_hits_misses_and_runs_without_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hit, miss = planned_run(tmp_path, "hit", 2.22), planned_run(tmp_path, "miss", 2.42)
    open_, none = learning_run(tmp_path, "open", "plan.loss=2.2"), learning_run(tmp_path, "none", share=1.0)
    found = scored(capsys, hit, miss, open_, none)
    rows = {row["run"]: row for row in found["scores"]}
    assert rows["hit"]["loss_error"] == pytest.approx(2.22 / 2.2 - 1, abs=1e-6)
    assert (rows["hit"]["within"], rows["miss"]["within"], found["loss_within"]) == (True, False, 0.5)
    assert found["loss_mean_error"] == pytest.approx((0.02 + 0.22) / 2.2 / 2, abs=1e-6)
    assert rows["hit"]["unchanged"] is True
    assert rows["hit"]["speed_error"] is not None
    assert (rows["open"]["ended"], rows["open"]["planned"], rows["none"]["planned"]) == (False, False, False)
    assert main(["score", hit, miss, open_, none]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("within", "missed", "no plan", "has not ended"))


def test_a_plan_that_was_changed_afterwards_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned_run(tmp_path, "one", 2.42)
    file = Path(run) / "plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "loss": 2.2}))
    assert scored(capsys, run)["scores"][0]["unchanged"] is False
    assert main(["score", run]) == 0
    assert "changed after" in capsys.readouterr().out


def test_a_plan_of_a_version_without_hashes_is_not_called_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned_run(tmp_path, "one", 2.42)
    file = Path(run) / "plan.json"
    older = {key: value for key, value in json.loads(file.read_text()).items() if key != "hash"}
    file.write_text(json.dumps(older))
    assert scored(capsys, run)["scores"][0]["unchanged"] is None
    assert main(["score", run]) == 0
    assert "changed after" not in capsys.readouterr().out


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", learning_run(tmp_path, "one")]) == 2
    assert "plan budget --emit" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "none")]) == 2
