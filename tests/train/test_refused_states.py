"""Only accepted steps are progress: no state with refused steps is saved, exported, or resumed before a good one."""

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from families import ledger
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.manifest import read_header
from minka.checkpoint.restore import whole_tensors
from minka.launch.supervisor_link import SupervisorLink
from minka.parallel.engine import Engine, Sums
from minka.parallel.inputs import ModelInputs
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder
from minka.train import loop
from minka.train.command import main
from ranks import on_ranks
from tiny import tiny, train_rank

GOOD = 10**9


def session(config: RunConfig, refused: Collection[int], ruined: int = GOOD, stop: int = GOOD, kill: int = GOOD) -> int:
    """Train with NaN losses in the steps `refused` and weights of NaN after step `ruined`.

    The session is asked to stop, or dies without a word, once the step `stop` or `kill` has ended.
    """
    (forward_backward, apply), right = (Engine.forward_backward, Engine.apply), vars(loop)["learning_rate"]
    alive, asked = SupervisorLink.heartbeat, SupervisorLink.stop_requested
    at = 0

    def noted(config: RunConfig, step: int, tokens: int) -> float:
        nonlocal at
        at = step + 1
        return float(right(config, step, tokens))

    def broken(self: Engine, micro_batches: list[ModelInputs], target_count: int) -> Sums:
        sums = forward_backward(self, micro_batches, target_count)
        return Sums(sums.loss * math.nan, sums.z_loss) if at in refused else sums

    def ruining(self: Engine, rate: float, *rest: Any) -> None:
        apply(self, rate, *rest)
        if at == ruined:
            for name, piece in self.tensors().items():
                if name.startswith("model."):
                    piece.local.fill_(math.nan)

    def beat(self: SupervisorLink, step: int, *, done: bool = False) -> None:
        alive(self, step, done=done)
        if step == kill and not done:
            raise RuntimeError("the machine is gone")

    with (
        patch.object(loop, "learning_rate", noted),
        patch.object(Engine, "forward_backward", broken),
        patch.object(Engine, "apply", ruining),
        patch.object(SupervisorLink, "heartbeat", beat),
        patch.object(SupervisorLink, "stop_requested", lambda self: at >= stop or asked(self)),
    ):
        return train_rank(config)


def run(config: RunConfig, *arguments: Any, ranks: int = 1) -> int:
    """One session on `ranks` ranks; its status."""
    (status, *others) = on_ranks(session, ranks, config, *arguments)
    assert all(other == status for other in others)
    return int(status)


def steps_of(folder: RunFolder) -> list[int]:
    return [read_header(path).step for path in checkpoints(folder.checkpoints)]


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return dict(whole_tensors(folder.checkpoints / f"step-{step:08d}", ""))


def saving(folder: Path, name: str = "tiny", max_steps: int = 16, **checkpoint: object) -> RunConfig:
    sections: dict[str, dict[str, object]] = {
        "run": {"name": name, "max_steps": max_steps},
        "schedule": {"warmup": 2},
        "checkpoint": {"every_steps": 4, "keep": 2, "export": True, **checkpoint},
        "guard": {"max_refused_steps": 4},
        "tracking": {"log_every": 3},
    }
    return tiny(folder, **sections)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_is_due_waits_until_a_step_is_accepted(ranks: int, tmp_path: Path) -> None:
    config = saving(tmp_path, keep=9, keep_every_steps=8)
    assert run(config, (7, 8, 9, 12), ranks=ranks) == ExitStatus.DONE
    folder = RunFolder.of(config)
    assert steps_of(folder) == [4, 10, 13, 16]
    headers = [read_header(path) for path in checkpoints(folder.checkpoints)]
    assert [header.permanent for header in headers] == [False, True, False, True]  # 10 stands for 8
    assert [header.state["refused_in_a_row"] for header in headers] == [0] * 4


def test_a_stop_amid_refused_steps_saves_the_last_accepted_one_and_exports_nothing(tmp_path: Path) -> None:
    config = saving(tmp_path)
    assert run(config, (6, 7, 8), GOOD, 7) == ExitStatus.STOPPED
    folder = RunFolder.of(config)
    assert steps_of(folder) == [4, 5]
    assert not folder.export.exists()
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], ending["step"], ending["requeue"]) == (85, 5, True)


def test_a_run_with_refused_steps_resumes_to_the_weights_of_the_undisturbed_one(tmp_path: Path) -> None:
    refused = (5, 7, 8, 9, 13)
    whole, cut = saving(tmp_path, "whole"), saving(tmp_path, "cut")
    assert run(whole, refused) == ExitStatus.DONE
    for kill in (8, 11):  # amid refused steps, and after the save that had waited for their end
        with pytest.raises(AssertionError, match="the machine is gone"):
            run(cut, refused, GOOD, GOOD, kill)
    assert run(cut, refused, GOOD, 13) == ExitStatus.STOPPED  # after a step that was just refused
    assert run(cut, refused) == ExitStatus.DONE
    one, other = (weights(RunFolder.of(config), 16) for config in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    skips = [[e["step"] for e in ledger(RunFolder.of(config)) if e["event"] == "skip"] for config in (whole, cut)]
    assert skips == [list(refused)] * 2


def test_a_run_whose_last_steps_were_refused_is_done_with_the_last_accepted_one(tmp_path: Path) -> None:
    config = saving(tmp_path)
    assert run(config, (14, 15, 16)) == ExitStatus.DONE
    folder = RunFolder.of(config)
    assert steps_of(folder) == [12, 13]
    assert (folder.export / "config.json").is_file()
    assert json.loads(folder.exit_file.read_text())["step"] == 13
    assert (folder.evals / "step-00000013").is_dir()
    assert main([str(folder.path)]) == 0  # it is finished


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_good_checkpoint_outlives_a_ruined_one_and_the_run_goes_back_to_it(keep: int, tmp_path: Path) -> None:
    config = saving(tmp_path, keep=keep)
    folder = RunFolder.of(config)
    assert run(config, (), 12) == ExitStatus.NEEDS_PERSON  # its weights are ruined in step 12, and saved
    assert steps_of(folder) == [4, 8][-keep:]
    assert (folder.checkpoints / "step-00000012.refused-1" / "manifest.json").is_file()
    assert not folder.export.exists()
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], ending["step"], ending["requeue"]) == (86, 16, False)
    assert f"`minka train {folder.path}@8` goes back to step 8" in ending["reason"]
    assert [e["reason"] for e in ledger(folder) if e["event"] == "stop"][-1] == ending["reason"]
    assert run(config, ()) == ExitStatus.DONE  # cured: it resumes from step 8 by itself
    whole = saving(tmp_path, "whole")
    assert run(whole, ()) == ExitStatus.DONE
    one, other = weights(folder, 16), weights(RunFolder.of(whole), 16)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(steps_of(folder)) == keep


def test_at_86_nothing_is_saved_and_the_only_checkpoint_stays(tmp_path: Path) -> None:
    config = saving(tmp_path, keep=1, every_steps=5)
    folder = RunFolder.of(config)
    assert run(config, (), 5) == ExitStatus.NEEDS_PERSON
    assert steps_of(folder) == [5]
    assert "the only whole checkpoint is of the step whose weights were refused" in folder.exit_file.read_text()
    fresh = saving(tmp_path, "fresh", every_steps=5)
    assert run(fresh, range(6, 17)) == ExitStatus.NEEDS_PERSON
    assert steps_of(RunFolder.of(fresh)) == [5]


def test_a_run_that_ends_with_every_step_refused_is_not_done_and_exports_nothing(tmp_path: Path) -> None:
    config = saving(tmp_path, max_steps=3)
    folder = RunFolder.of(config)
    assert run(config, (1, 2, 3)) == ExitStatus.NEEDS_PERSON
    assert not folder.export.exists()
    assert steps_of(folder) == []
    assert "every step of the run was refused; nothing was saved" in folder.exit_file.read_text()


@pytest.mark.slow
def test_a_run_that_ends_with_ruined_weights_is_not_done(tmp_path: Path) -> None:
    """Its last step was accepted, or too few were refused for the guard to stop it."""
    config = saving(tmp_path)
    for ruined in (16, 14):
        folder = RunFolder.of(config)
        assert run(config, (), ruined) == ExitStatus.NEEDS_PERSON
        assert not folder.export.exists()
        assert steps_of(folder) == [8, 12]
        shutil.rmtree(folder.path)
