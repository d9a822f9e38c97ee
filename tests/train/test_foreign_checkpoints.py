"""A checkpoint of a different run in a run's folder is named by whoever would read it, and kept out of retention."""

import json
import shutil
from pathlib import Path

import pytest

from families import copy, rank_refuses, refused, stable_phase
from minka.checkpoint.catalogue import Catalogue, find_checkpoint, steps_of
from minka.checkpoint.manifest import NAME, read_header, seal
from minka.checkpoint.restore import restore_from
from minka.plan.checkpoint_owner import difference_of_runs
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.train.command import main
from saved import ALONE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with checkpoints of steps 5, 10, 15 and 20; tests that write into it take a copy."""
    return stable_phase(tmp_path_factory)


def with_foreign(base: RunFolder, name: str, step: int = 20, **changes: object) -> RunFolder:
    """A copy of the run in which the checkpoint of `step` says that it is of a different one."""
    folder = RunFolder.of(copy(base, name))
    relabel(folder.checkpoints / f"step-{step:08d}", **(changes or {"run_id": "b" * 16}))
    return folder


def relabel(path: Path, **changes: object) -> None:
    """Write the manifest again with other values in its state; None removes one."""
    values = json.loads((path / NAME).read_text())
    state = {**values["state"], **changes}
    values["state"] = {key: value for key, value in state.items() if value is not None}
    (path / NAME).write_bytes(seal({key: value for key, value in values.items() if key not in ("format", "sha256")}))


def test_every_checkpoint_says_of_which_run_it_is(base: RunFolder) -> None:
    ids = {read_header(base.checkpoints / f"step-{step:08d}").state["run_id"] for step in steps_of(base.checkpoints)}
    assert ids == {base.run_id()}
    assert len(base.run_id()) == 16


def test_whoever_would_read_it_refuses_it_and_says_what_works(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_foreign(base, "copied")
    before = sorted(folder.path.rglob("*"))
    for arguments in ([], ["run.max_steps=25"], ["--dry-run"], ["run.name=new", f"run.start_from={folder.path}"]):
        said = refused(capsys, str(folder.path), *arguments)
        assert "step-00000020: this checkpoint is of a different run" in said
        assert f"move it out of {folder.checkpoints}" in said
    with pytest.raises(UserError, match="of a different run"):
        find_checkpoint(folder.checkpoints)
    with pytest.raises(UserError, match="of a different run"):
        restore_from(folder.checkpoints / "step-00000020", {}, ALONE)
    assert find_checkpoint(folder.checkpoints, "15").name == "step-00000015"
    assert sorted(folder.path.rglob("*")) == before


def test_a_rank_that_meets_one_on_its_way_to_an_older_checkpoint_refuses_it(base: RunFolder) -> None:
    folder = with_foreign(base, "fallback", 15)
    (folder.checkpoints / "step-00000020" / "rank-00000.safetensors").write_bytes(b"")
    said = rank_refuses(load_run(str(folder.path), ["run.max_steps=25"]).config)
    assert "step-00000015: this checkpoint is of a different run" in said


def test_retention_neither_counts_nor_deletes_it(base: RunFolder) -> None:
    folder = with_foreign(base, "kept", 5)
    assert [path.name for path in Catalogue(folder.checkpoints).prune(1)] == ["step-00000010", "step-00000015"]
    assert steps_of(folder.checkpoints) == [5, 20]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"config": None, "data_sha256": None}, ""),  # as format 1 has it
        ({"data_sha256": "e" * 64}, "a different token store"),
        ({"seed": 8}, "run.seed = "),
        ({"rope_theta": 5e5}, "model.rope_theta = "),
        ({"learning_rate": 1e-5}, ""),  # a run may change it
    ],
)
def test_of_a_checkpoint_without_an_id_its_settings_are_compared(
    changes: dict[str, object], told: str, base: RunFolder
) -> None:
    saved = dict(read_header(base.checkpoints / "step-00000020").state)
    del saved["run_id"]
    config = json.loads(json.dumps(saved["config"]))
    for key, value in changes.items():
        for section in ("run", "model", "optimizer"):
            if key in config[section]:
                config[section][key] = value
    saved |= {"config": config} | {key: value for key, value in changes.items() if key in ("config", "data_sha256")}
    saved = {key: value for key, value in saved.items() if value is not None}
    found = difference_of_runs(base, saved)
    assert found.startswith("it was trained") == bool(told)
    assert told in found


def test_a_dry_run_promises_no_step_whose_files_are_cut_or_gone(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.of(copy(base, "cut"))
    shard = folder.checkpoints / "step-00000020" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder.checkpoints / "step-00000015" / "rank-00000.json").unlink()
    assert main([str(folder.path), "run.max_steps=25", "--dry-run"]) == 0
    assert "resumes from step 10" in capsys.readouterr().out
    for step in (5, 10):
        shutil.rmtree(folder.checkpoints / f"step-{step:08d}")
    assert main([str(folder.path), "run.max_steps=25", "--dry-run"]) == 86
    assert "none of the checkpoints is whole" in capsys.readouterr().err
