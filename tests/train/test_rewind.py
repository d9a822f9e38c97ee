"""RUN@STEP goes back to a checkpoint: later ones are moved aside, and what is trained from there is what was before."""

import json
import math
import shutil
from random import Random

import pytest

from families import copy, ledger, refused, stable_phase, steps
from minka.checkpoint.catalogue import newest_first
from minka.checkpoint.commit import step_name
from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.guard import judge
from minka.plan.retention import Kept, expendable, way_back
from minka.plan.run_folder import RunFolder
from minka.train.command import main
from minka.train.rewind import return_to
from minka.train.start_or_resume import position_of
from minka.train.worker import work
from ranks import on_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with checkpoints of steps 5, 10, 15 and 20; tests that write into it take a copy."""
    return stable_phase(tmp_path_factory)


def back(config: RunConfig, step: int) -> int:
    """One rank of `minka train RUN@STEP`."""
    return work(Job(config=config, threads=1, return_to=step))


def test_a_run_goes_back_and_trains_the_same_steps_again(base: RunFolder) -> None:
    config = copy(base, "again")
    folder = RunFolder.of(config)
    assert on_ranks(back, 1, config, 10) == [ExitStatus.DONE]
    assert newest_first(folder.checkpoints) == [20, 15, 10, 5]
    aside = sorted(path.name for path in (folder.checkpoints / "old-1").iterdir())
    assert aside == [step_name(15), step_name(20)]
    assert [path.name for path in (folder.evals / "old-1").iterdir()] == [step_name(20)]
    events = ledger(folder)
    assert steps(events) == steps(ledger(base))
    (rewind,) = [event for event in events if event["event"] == "rewind"]
    assert (rewind["step"], rewind["tokens"]) == (10, steps(events)[10]["tokens"])
    assert f"the later checkpoints are in {folder.checkpoints / 'old-1'}" in rewind["reason"]


def test_a_dry_run_says_what_would_be_moved_and_touches_nothing(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(base.path.rglob("*"))
    assert main([f"{base.path}@10", "optimizer.learning_rate=1e-4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"# {base.path} goes back to step 10; its later checkpoints (15, 20) would be moved aside" in said
    assert main([f"{base.path}@10", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["start"]["step"] == 10
    assert main([f"{base.path}@20", "--dry-run"]) == 0  # it is there already
    assert "is finished, at step 20" in capsys.readouterr().out
    assert sorted(base.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "arguments", "told"),
    [
        ("@7", [], "no checkpoint of step 7. steps saved here: 5, 10, 15, 20"),
        ("@last", [], "'last' is not a step"),
        ("@10", ["--from-scratch"], "a run either goes back to a step or restarts"),
        ("@10", ["run.name=new"], "has not begun, so it has no step 10 to go back to"),
        ("@10", ["run.max_steps=9"], "the run is at step 10 already"),
    ],
)
def test_a_step_that_is_not_there_is_refused(
    source: str, arguments: list[str], told: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(base.path.rglob("*"))
    for dry in ([], ["--dry-run"]):
        assert told in refused(capsys, f"{base.path}{source}", *arguments, *dry)
    assert sorted(base.path.rglob("*")) == before


def test_a_damaged_step_is_refused_and_nothing_is_moved(base: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.of(copy(base, "cut"))
    shard = folder.checkpoints / step_name(10) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "rank-00000.safetensors has" in refused(capsys, f"{folder.path}@10")
    assert newest_first(folder.checkpoints) == [20, 15, 10, 5]


SLURM = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize("launched", [SLURM, TORCHRUN], ids=["slurm", "torchrun"])
def test_a_repeated_start_goes_back_unless_its_job_has_done_so(
    launched: dict[str, str], base: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job can be repeated before its first start came so far: preempted while it prepared data, say."""
    folder = RunFolder.of(copy(base, f"repeated-{min(launched)}"))
    for name, value in launched.items():
        monkeypatch.setenv(name, "1" if value == "0" else value)
    command = [f"{folder.path}@10", "run.max_steps=25", "--dry-run"]
    assert main(command) == 0
    assert "goes back to step 10" in capsys.readouterr().out
    return_to(folder, position_of(folder, 15))
    assert main(command) == 0
    said = capsys.readouterr()
    assert "resumes from step 15" in said.out
    assert "this job has gone back once already" in said.err
    monkeypatch.setenv(*("SLURM_JOB_ID", "8") if launched is SLURM else ("TORCHELASTIC_RUN_ID", "y"))
    assert main(command) == 0
    assert "goes back to step 10" in capsys.readouterr().out


def test_an_interrupted_return_is_finished_by_the_same_command(base: RunFolder) -> None:
    config = copy(base, "interrupted")
    folder = RunFolder.of(config)
    (folder.checkpoints / "old-1").mkdir()
    shutil.move(folder.checkpoints / step_name(20), folder.checkpoints / "old-1")
    folder.exit_file.unlink()
    assert on_ranks(back, 1, config, 10) == [ExitStatus.DONE]
    assert [path.name for path in (folder.checkpoints / "old-2").iterdir()] == [step_name(15)]
    assert steps(ledger(folder)) == steps(ledger(base))


def test_a_return_within_a_longer_run_takes_new_settings_from_there(base: RunFolder) -> None:
    config = copy(base, "cured", "optimizer.learning_rate=1e-3", "run.max_steps=12")
    assert on_ranks(back, 1, config, 10) == [ExitStatus.DONE]
    events = steps(ledger(RunFolder.of(config)))
    assert max(events) == 12
    assert events[11]["learning_rate"] == 1e-3
    assert events[10] == steps(ledger(base))[10]


def test_in_random_histories_a_good_checkpoint_is_left_and_found() -> None:
    for seed in range(300):
        random_history(Random(seed))


def random_history(dice: Random) -> None:
    """Ruined and refused steps, crashes, stops at 86 and resumes, decided by the functions that decide in a run."""
    keep, every, number, proven = dice.randint(1, 3), dice.randint(1, 5), 0, False
    there: dict[int, tuple[Kept, bool]] = {}  # step -> the checkpoint, and whether its weights are good
    for _ in range(12):
        accepted = step = next(iter(newest(there)), 0)
        good, refusals, waits = there[step][1] if there else True, 0, False
        for _ in range(dice.randint(1, 30)):  # the session ends by a crash, or by the guard
            step += 1
            fine = good and dice.random() > 0.15
            verdict = judge(1.0 if fine else math.nan, 1.0, refused_in_a_row=refusals, max_refused=4)
            refusals, waits = verdict.refused_in_a_row, waits or step % every == 0
            if verdict.action == "stop":
                if (aside := way_back(newest(there), accepted).set_aside) is not None:
                    del there[aside]
                first = [there[step][1] for step in newest(there)][:1]
                assert first == [True] or len(there) < 2, "the next start resumes from ruined weights"
                break
            if verdict.action == "accept":
                proven = proven or bool(there)  # the weights of every checkpoint led to this step
                accepted, good = step, dice.random() > 0.05  # an update may ruin the weights
                if waits:
                    for old in expendable([kept for kept, _ in there.values()], keep):
                        del there[old]
                    number, waits = number + 1, False
                    there[step] = (Kept(step, number), good)
        assert len(there) <= keep + 1
        assert not proven or any(good for _, good in there.values())
        assert {step for step, (_, good) in there.items() if not good} <= {*newest(there)[:1]}


def newest(there: dict[int, tuple[Kept, bool]]) -> list[int]:
    return sorted(there, key=lambda step: there[step][0].number, reverse=True)
