"""A resumed run: allowed changes are shown, others are refused, and no run restarts without saying so."""

import hashlib
import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from commands import minka, train, written
from families import (
    assert_needs_person,
    copy,
    crash,
    ledger,
    rank_refuses,
    refused,
    said,
    samples,
    stable_phase,
    steps,
    train_refusing,
    trained,
)
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.manifest import read_header
from minka.launch.environment import requeued
from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import read_ledger
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.plan.run_state import RunState
from minka.train import restore_or_init
from minka.train.command import main
from minka.train.restore_or_init import check_rate
from minka.train.schedule import learning_rate
from minka.train.start_or_resume import read_state
from minka.train.state import State, manifest_state
from minka.train.worker import work
from ranks import on_ranks
from saved import ALONE
from tiny import tiny, train_rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run; tests that write into it take a copy."""
    return stable_phase(tmp_path_factory)


def test_a_finished_run_goes_on_when_it_is_made_longer_and_says_what_becomes_of_the_rate(base: RunFolder) -> None:
    config = copy(base, "longer", "run.max_steps=25", "schedule.kind=linear")
    text = said(config)
    rate = learning_rate(config, 20, steps(ledger(base))[20]["tokens"])
    assert f"learning rate of step 21: 0.003 with the saved settings, {rate:.4g} with the new ones" in text
    assert "run.max_steps = 25 (was 20)" in text
    folder = RunFolder.of(config)
    events = ledger(folder)
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 26))
    assert steps(events)[21]["learning_rate"] == rate
    start = [e for e in events if e["event"] == "start"][-1]
    assert start["changed"] == {"run.max_steps": [20, 25], "schedule.kind": ["constant", "linear"]}
    assert (start["config"]["run"]["max_steps"], folder.config()) == (25, config)
    assert samples(folder)[21][0] == samples(folder)[20][-1] + 1


def test_a_longer_constant_run_is_the_run_that_was_longer_from_the_beginning(base: RunFolder) -> None:
    whole = load_run(str(base.path), ["run.name=whole", "run.max_steps=24"]).config
    assert steps(trained(copy(base, "extended", "run.max_steps=24"))) == steps(trained(whole))


def test_a_finished_run_without_more_steps_says_so_and_exits_0(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in base.path.rglob("*") if path.is_file()}
    assert main([str(base.path)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([str(base.path), "optimizer.beta1=0.8"]) == 0
    assert "Without more steps, optimizer.beta1 changes nothing" in capsys.readouterr().out
    assert main([str(base.path), "--json", "run.max_steps=20"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert {path: path.read_bytes() for path in base.path.rglob("*") if path.is_file()} == before


def test_ranks_without_a_supervisor_learn_from_rank_0_that_the_run_is_over(base: RunFolder) -> None:
    before = {path: path.read_bytes() for path in base.path.rglob("*") if path.is_file()}
    assert on_ranks(train_rank, 2, base.config()) == [ExitStatus.DONE] * 2
    assert {path: path.read_bytes() for path in base.path.rglob("*") if path.is_file()} == before


def test_a_state_that_a_different_process_has_made_outdated_is_read_again(base: RunFolder) -> None:
    folder = RunFolder.of(copy(base, "stale"))
    outdated = read_state(folder)
    for length, state in ((22, None), (24, outdated)):
        longer = load_run(str(folder.path), [f"run.max_steps={length}"]).config
        assert on_ranks(train_from, 1, longer, state) == [ExitStatus.DONE]
    assert [e["step"] for e in ledger(folder) if e["event"] == "restore"] == [20, 22]


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_or_missing_newest_checkpoint_is_a_fallback_in_the_ledger(lost: bool, base: RunFolder) -> None:
    config = copy(base, f"fallback-{lost}", "run.max_steps=22")
    folder = RunFolder.of(config)
    if lost:
        shutil.rmtree(folder.checkpoints / "step-00000020")
    shard = checkpoints(folder.checkpoints)[-1] / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    events = trained(config)
    passed_over = [Path(e["path"]).name for e in events if e["event"] == "fallback"]
    assert passed_over == (["step-00000015", "step-00000020"] if lost else ["step-00000020"])
    assert [e["step"] for e in events if e["event"] == "restore"] == [10 if lost else 15]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 23))


def train_from(config: RunConfig, state: RunState | None) -> int:
    """One rank that a supervisor has given this state."""
    return work(Job(config=config, state=state, threads=1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.max_steps=19", "the run is at step 20 already, after run.max_steps=19"),
        ("run.max_tokens=6000", "the run is at token 6272 already"),
        ("run.seed=8", "run.seed = 8 (was 7)"),
        ("data.seq_len=16", "data.seq_len = 16 (was 32)"),
        ("model.rope_theta=5", "model.rope_theta = 5.0 (was 10000.0)"),
        ("model.layers=3", "model.layers = 3 (was 2)"),
    ],
)
def test_what_may_not_be_another_is_refused_by_name(
    override: str, message: str, base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, str(base.path), override)
    assert message in said
    assert refused(capsys, str(base.path), override, "--dry-run") == said


def test_changes_from_the_command_line_reach_the_ledger_and_the_reader(base: RunFolder) -> None:
    config = copy(base, "typed")
    done = minka("train", str(RunFolder.of(config).path), "--ranks", "1", "run.max_steps=22", "optimizer.beta2=0.9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run.max_steps = 22 (was 20)") == 1
    assert "optimizer.beta2 = 0.9 (was 0.95)" in done.stdout
    start = [e for e in ledger(RunFolder.of(config)) if e["event"] == "start"][-1]
    assert start["changed"] == {"optimizer.beta2": [0.95, 0.9], "run.max_steps": [20, 22]}


def test_the_rate_of_the_next_step_is_held_against_the_checkpoints(base: RunFolder) -> None:
    config = base.config()
    saved = read_header(checkpoints(base.checkpoints)[1]).state
    state = State.from_json(saved)
    assert saved["learning_rate"] == learning_rate(config, 10, state.tokens)

    def rate_line(saved: Mapping[str, Any], config: RunConfig) -> str:
        return check_rate(saved, base.config(), config, state, "here")

    assert rate_line(saved, config) == ""
    assert rate_line({**saved, "learning_rate": saved["learning_rate"] * (1 + 1e-12)}, config) == ""
    with pytest.raises(UserError, match=r"learning rate of step 11 would be 0.003, .* written for 0.00303") as caught:
        rate_line({**saved, "learning_rate": saved["learning_rate"] * 1.01}, config)
    assert caught.value.status == ExitStatus.NEEDS_PERSON
    changed = load_run(str(base.path), ["optimizer.learning_rate=1e-3"]).config
    assert "0.003 with the saved settings, 0.001 with the new ones" in rate_line(saved, changed)
    old = {key: saved[key] for key in ("step", "samples", "tokens", "refused_in_a_row")}  # as format 1 has it
    assert rate_line(old, config) == ""
    assert "0.003 with the saved settings" in rate_line(old, changed)


def test_a_checkpoint_says_the_rate_of_the_step_after_it_and_the_settings_it_was_made_with(tmp_path: Path) -> None:
    config = tiny(tmp_path)  # a cosine: no two steps have the same
    state = State(step=7, samples=9, tokens=99)
    saved = manifest_state(config, state, ALONE, "a" * 16, "d" * 64, [{"run": "base", "step": 3}])
    assert saved["learning_rate"] == learning_rate(config, 7, 99) != learning_rate(config, 8, 99)
    assert saved["config"] == config.model_dump(mode="json")
    canonical = json.dumps(saved["config"], sort_keys=True, separators=(",", ":"))
    assert saved["config_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert (saved["data_sha256"], saved["lineage"]) == ("d" * 64, [{"run": "base", "step": 3}])
    assert saved["layout"]["shard"] == 1
    assert saved["versions"].keys() >= {"minka", "torch"}
    assert State.from_json(json.loads(json.dumps(saved))) == state


def test_a_schedule_that_drifted_under_a_run_stops_it_for_a_person(base: RunFolder) -> None:
    config = copy(base, "drifted")
    shutil.rmtree(checkpoints(RunFolder.of(config).checkpoints)[-1])
    RunFolder.of(config).exit_file.unlink()  # as if it had been cut off
    for status, text in on_ranks(train_drifted, 2, config):
        assert status == ExitStatus.NEEDS_PERSON
        assert "learning rate of step 16 would be 0.0015, and the checkpoint was written for 0.003" in text
    last = list(read_ledger(RunFolder.of(config).ledger_file))[-1]
    assert (last["event"], last["step"]) == ("refuse", 15)
    assert "would be 0.0015" in last["reason"]
    assert_needs_person(RunFolder.of(config), "learning rate of step 16 would be 0.0015", step=15)


@pytest.mark.slow
def test_a_finished_run_without_a_whole_checkpoint_is_not_called_finished_when_it_is_made_longer(
    base: RunFolder,
) -> None:
    folder = RunFolder.of(copy(base, "unreadable"))
    for manifest in folder.checkpoints.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text()[:40])
    done = minka("train", str(folder.path), "run.max_steps=25", "--ranks", "1")
    assert done.returncode == ExitStatus.NEEDS_PERSON, done.stdout + done.stderr
    assert "none of the checkpoints is whole" in done.stderr
    assert "is finished" not in done.stdout
    assert_needs_person(folder, "none of the checkpoints is whole", step=20)


def train_drifted(config: RunConfig) -> tuple[int, str]:
    """One rank of a minka whose schedule is another."""
    restore_or_init.learning_rate = lambda *at: learning_rate(*at) / 2  # type: ignore[attr-defined]
    return train_refusing(config)


def test_a_run_never_begins_from_nothing_where_there_is_history(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy(base, "lost")
    folder = RunFolder.of(config)
    shutil.rmtree(folder.checkpoints)
    assert main([str(folder.path)]) == 0  # it is finished all the same
    assert "is finished" in capsys.readouterr().out
    text = refused(capsys, str(folder.path), "run.max_steps=25", status=ExitStatus.NEEDS_PERSON)
    assert f"minka train {folder.path} --from-scratch" in text
    assert_needs_person(folder, "all of them are gone", step=20)
    folder.exit_file.unlink()
    assert "--from-scratch" in refused(capsys, str(folder.path), status=ExitStatus.NEEDS_PERSON)
    assert "--from-scratch" in rank_refuses(config, ExitStatus.NEEDS_PERSON)


@pytest.mark.slow
def test_from_scratch_moves_the_checkpoints_aside_and_gives_the_same_run_again(base: RunFolder) -> None:
    config = copy(base, "again")
    folder = RunFolder.of(config)
    for number in (1, 2):
        done = minka("train", str(folder.path), "--ranks", "1", "--from-scratch")
        assert done.returncode == 0, done.stderr
        assert f"checkpoints.old-{number}" in done.stdout
        events = ledger(folder)
        restart = [e for e in events if e["event"] == "restart"][-1]
        assert (restart["step"], restart["tokens"]) == (0, 0)
        assert restart["reason"] == f"--from-scratch was given; its checkpoints are in checkpoints.old-{number}"
        assert steps(events) == steps(ledger(base))
        assert len([e for e in events if e["event"] == "restart"]) == number
        assert len(checkpoints(folder.path / f"checkpoints.old-{number}")) == 4


def test_a_scheduler_that_repeats_a_command_throws_nothing_away() -> None:
    assert not requeued({})
    assert not requeued({"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"})
    assert requeued({"SLURM_RESTART_COUNT": "1"})
    assert requeued({"TORCHELASTIC_RESTART_COUNT": "2"})


def test_a_killed_extension_is_not_taken_for_finished(base: RunFolder) -> None:
    config = copy(base, "killed", "run.max_steps=30", "checkpoint.every_steps=0")
    crash(config, 25)
    folder = RunFolder.of(config)
    assert not folder.finished()
    assert folder.config().run.max_steps == 30
    events = trained(folder.config())
    assert [e["step"] for e in events if e["event"] == "restore"] == [20, 20]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 31))


@pytest.mark.slow
def test_a_stopped_run_that_is_cut_to_where_it_stands_ends_there(base: RunFolder, tmp_path: Path) -> None:
    values = ["run.name=cut", f"run.folder={tmp_path}", "run.max_steps=100000"]
    config = load_run(str(base.path), values).config
    process = train(config, ranks=1)
    folder = RunFolder.of(config)
    while not any(e["event"] == "step" and e["step"] >= 3 for e in ledger(folder)):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == ExitStatus.STOPPED
    at = read_header(checkpoints(folder.checkpoints)[-1]).step
    file = str(written(config))
    less = minka("train", file, f"run.max_steps={at - 1}", "--ranks", "1")
    assert less.returncode == ExitStatus.REFUSED
    assert minka("train", file, f"run.max_steps={at}", "--ranks", "1").returncode == ExitStatus.DONE
    assert ledger(folder)[-1]["event"] == "stop"
    assert (ledger(folder)[-1]["reason"], ledger(folder)[-1]["step"]) == ("done", at)
