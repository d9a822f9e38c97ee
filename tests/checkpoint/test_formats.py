"""A checkpoint of every format there ever was resumes with the losses that its own code had."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minka.checkpoint.manifest import FORMAT, read_header
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.ledger import current, read_ledger
from minka.plan.load_config import validate
from minka.plan.run_folder import RunFolder
from minka.train.parent_run import create_run, open_run
from ranks import on_ranks
from resealed import write_manifest
from tiny import train_rank

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "checkpoints"
FORMATS = sorted(path.name for path in GOLDENS.glob("format-*"))
RELATIVE = 1e-6


def with_checkpoint(golden: Path, folder: Path, ranks: int) -> RunConfig:
    """The golden's run under `folder`, as it was when it had saved, for so many ranks."""
    values: dict[str, Any] = json.loads((golden / "run.json").read_text())
    values["run"]["folder"] = str(folder)
    values["data"] |= {"paths": [str(golden / "corpus")], "store": str(folder / "store")}
    values["layout"] = {"shard": ranks}
    config = validate(values, str(golden))
    open_run(config)
    create_run(config, [])
    (saved,) = golden.glob("step-*")
    checkpoint = RunFolder.of(config).checkpoints / saved.name
    shutil.copytree(saved, checkpoint)
    body = json.loads((checkpoint / "manifest.json").read_text())
    if "data_sha256" in body["state"]:  # a store's hash covers data.paths, which is a different place here
        body["state"]["data_sha256"] = RunFolder.of(config).provenance()["data"]["manifest_sha256"]
        write_manifest(checkpoint, body)
    return config


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_every_format_resumes_as_with_its_own_code(name: str, ranks: int, tmp_path: Path) -> None:
    golden = GOLDENS / name
    config = with_checkpoint(golden, tmp_path, ranks)
    assert on_ranks(train_rank, ranks, config) == [ExitStatus.DONE] * ranks
    events = current(read_ledger(RunFolder.of(config).ledger_file))
    steps = [event for event in events if event["event"] == "step"]
    expected = json.loads((golden / "steps.json").read_text())
    assert [event["step"] for event in steps] == [step["step"] for step in expected]
    for event, step in zip(steps, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert event[key] == pytest.approx(step[key], rel=RELATIVE, abs=0), (step["step"], key)
    assert any(event["event"] == "restore" for event in events)
    saved = RunFolder.of(config).checkpoints / f"step-{expected[-1]['step']:08d}"
    assert read_header(saved).format == FORMAT  # and what it saves itself is of today's format


def test_there_is_a_golden_of_every_format() -> None:
    """Of today's, too: made by the code that writes it, before that code changes."""
    assert [f"format-{number}" for number in range(1, FORMAT + 1)] == FORMATS
    for number, name in enumerate(FORMATS, start=1):
        (saved,) = (GOLDENS / name).glob("step-*")
        assert json.loads((saved / "manifest.json").read_text())["format"] == number
