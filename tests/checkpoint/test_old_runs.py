"""A run of an older version (goldens/run: ledger, token store, format-2 checkpoints) is resumed by this one."""

import json
import shutil
from pathlib import Path

import pytest

from commands import minka
from minka.plan.ledger import current, read_ledger

GOLDEN = Path(__file__).resolve().parent.parent / "goldens" / "run"
RELATIVE = 1e-6


def test_a_run_of_an_older_version_resumes_verifies_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDEN / "run", tmp_path / "runs" / "old")
    shutil.copytree(GOLDEN / "store", tmp_path / "stores" / "old")
    shutil.copytree(GOLDEN.parent / "checkpoints" / "format-1" / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    before = (GOLDEN / "run" / "ledger.jsonl").read_text()
    assert len(list(read_ledger(Path("runs/old/ledger.jsonl")))) == before.count("\n")
    assert minka("data", "verify", "stores/old").returncode == 0
    done = minka("train", "runs/old", "--ranks", "1", "run.max_steps=12")
    assert done.returncode == 0, done.stderr
    assert Path("runs/old/ledger.jsonl").read_text().startswith(before)
    events = current(read_ledger(Path("runs/old/ledger.jsonl")))
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    assert list(steps) == list(range(1, 13))
    for step in json.loads((GOLDEN / "steps.json").read_text()):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert steps[step["step"]][key] == pytest.approx(step[key], rel=RELATIVE, abs=0), (step["step"], key)
    assert [event["step"] for event in events if event["event"] == "restore"] == [8]
    report = minka("report", "runs/old", "--json")
    assert report.returncode == 0, report.stderr
    assert Path("runs/old/report.html").stat().st_size > 0
