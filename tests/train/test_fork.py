"""Runs that start from a parent: each continues it, and records where it came from."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import minka
from families import crash, fork, ledger, said, samples, stable_phase, steps, trained
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.manifest import read_header
from minka.checkpoint.restore import whole_tensors
from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.train import restore_or_init
from minka.train.command import main
from minka.train.start_or_resume import read_and_check
from ranks import on_ranks
from tiny import corpus, train_rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The parent of all runs here."""
    return stable_phase(tmp_path_factory)


def test_a_fork_with_everything_is_the_parent_going_on_bit_for_bit(base: RunFolder) -> None:
    config = fork(base, "same", "base@10", "run.start_with=all")
    there, here = ledger(base), trained(config)
    assert steps(here) == {step: line for step, line in steps(there).items() if step > 10}
    assert {s: ids for s, ids in samples(base).items() if s > 10} == samples(RunFolder.of(config))
    mine, theirs = (dict(whole_tensors(checkpoints(f.checkpoints)[-1], "")) for f in (RunFolder.of(config), base))
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


def test_a_stable_phase_branches_into_a_cool_down_on_other_ranks(base: RunFolder) -> None:
    overrides = ("run.start_with=all", "schedule.kind=wsd", "schedule.decay=4", "schedule.final_ratio=0.0")
    config = fork(base, "cool", "base@10", *overrides, "run.max_steps=16")
    here, there = steps(trained(config, ranks=2)), steps(ledger(base))
    assert sorted(here) == list(range(11, 17))
    assert [here[s]["learning_rate"] for s in (11, 12)] == [there[11]["learning_rate"]] * 2
    falling = [here[s]["learning_rate"] / there[11]["learning_rate"] for s in (13, 14, 15, 16)]
    assert falling == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert here[11]["loss"] == pytest.approx(there[11]["loss"], rel=2e-6)
    assert here[16]["loss"] != there[16]["loss"]


def test_weights_alone_begin_a_run_at_step_0_and_a_hugging_face_folder_is_the_same_weights(base: RunFolder) -> None:
    by_run = fork(base, "weights", "base", "run.max_steps=6")
    by_hub = fork(base, "hub", str(base.export), "run.max_steps=6")
    one, other = trained(by_run), trained(by_hub, ranks=2)
    assert sorted(steps(one)) == [1, 2, 3, 4, 5, 6]
    assert samples(RunFolder.of(by_run)) == {s: ids for s, ids in samples(base).items() if s <= 6}
    assert steps(one)[1]["loss"] < steps(ledger(base))[1]["loss"] - 1  # it has learnt something already
    assert float(dict(whole_tensors(checkpoints(RunFolder.of(by_run).checkpoints)[-1], "optimizer."))["count"]) == 6
    for step, line in steps(one).items():
        assert line["loss"] == pytest.approx(steps(other)[step]["loss"], rel=2e-6)
    (parent,) = RunFolder.of(by_hub).lineage()
    assert (parent["run"], parent["folder"], parent["step"]) == ("", str(base.export.resolve()), 0)
    assert len(parent["sha256"]) == 64


def test_a_restart_from_a_hugging_face_folder_whose_weights_have_changed_is_refused(
    base: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(base.export, tmp_path / "hub")
    whole, crashed = (fork(base, name, str(tmp_path / "hub"), "run.max_steps=6") for name in ("whole", "crashed"))
    trained(whole)
    crash(crashed, 3)  # before its first checkpoint
    assert read_and_check(Job(config=whole, from_scratch=True)).from_scratch
    (weights,) = (tmp_path / "hub").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for job in (Job(config=whole, from_scratch=True), Job(config=crashed), Job(config=crashed, from_scratch=True)):
        with pytest.raises(UserError, match="have changed since it was created"):
            read_and_check(job)


def test_another_sequence_length_goes_on_with_the_counters_and_a_new_order(base: RunFolder) -> None:
    config = fork(base, "longer", "base@15", "run.start_with=all", "data.seq_len=16", "run.max_steps=18")
    text = said(config)
    assert "starts from base at step 15 (weights, optimizer, counters)" in text
    assert "first sample of a new order, because data.seq_len differs" in text
    assert sorted(steps(ledger(RunFolder.of(config)))) == [16, 17, 18]
    assert samples(RunFolder.of(config))[16] == list(range(26))
    state = read_header(checkpoints(RunFolder.of(config).checkpoints)[-1]).state
    assert (state["step"], state["samples"]) == (18, 3 * 26)
    assert state["tokens"] == read_header(base.checkpoints / "step-00000015").state["tokens"] + 3 * 13 * 32


def test_another_rope_base_starts_from_the_weights(base: RunFolder) -> None:
    config = fork(base, "rope", "base@20", "model.rope_theta=50000", "run.max_steps=5")
    line = "starts from base at step 20 (weights only; optimizer, schedule and data begin at 0)"
    text = said(config, "model.rope_theta")
    assert line in text
    assert "model.rope_theta = 50000.0 (was 10000.0): the same weights would compute a different function" in text
    (parent,) = RunFolder.of(config).lineage()
    assert parent["changed"] == {"model.rope_theta": [10000.0, 50000.0], "run.max_steps": [20, 5]}
    alike = steps(ledger(base))[20]["loss"] - steps(ledger(RunFolder.of(config)))[1]["loss"]
    assert abs(alike) < 1  # nearly the same function, unlike new weights


def test_other_data_in_the_parents_tokenizer_begin_a_new_order(base: RunFolder, tmp_path: Path) -> None:
    corpus(tmp_path / "other", seed=2)
    data = [f'data.paths=["{tmp_path / "other"}"]', f"data.store={tmp_path / 'store'}"]
    tokenizer = f"data.tokenizer={base.path.parent.parent / 'store' / 'tokenizer'}"
    config = fork(base, "data", "base@10", "run.start_with=all", "run.max_steps=12", *data, tokenizer)
    assert "because the token store differs" in said(config)
    assert samples(RunFolder.of(config))[11] == list(range(13))


def test_lineage_is_in_the_folder_the_ledger_the_checkpoints_and_goes_back_to_the_first(base: RunFolder) -> None:
    child = fork(base, "child", "base@10", "run.start_with=all", "run.max_steps=11")
    trained(child)
    grandchild = fork(base, "grandchild", "child", "run.max_steps=5", "schedule.warmup=2")
    events = trained(grandchild)
    folder = RunFolder.of(grandchild)
    parents = folder.lineage()
    assert [(p["run"], p["step"], p["with"]) for p in parents] == [("child", 11, "weights"), ("base", 10, "all")]
    assert parents[1]["sha256"] == read_header(base.checkpoints / "step-00000010").sha256
    assert parents[1]["tokens"] == read_header(base.checkpoints / "step-00000010").state["tokens"]
    assert parents[1]["folder"] == str(base.path.resolve())
    assert parents[0]["changed"] == {"run.max_steps": [11, 5], "schedule.warmup": [4, 2]}
    (start,) = [e for e in events if e["event"] == "start"]
    assert start["lineage"] == parents
    assert start["config"] == grandchild.model_dump(mode="json")
    assert start["changed"] == {}
    assert read_header(checkpoints(folder.checkpoints)[-1]).state["lineage"] == parents


@pytest.mark.slow
def test_the_command_that_made_a_fork_goes_on_with_it_when_the_parent_is_gone(base: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(base.path, tmp_path / "runs" / "parent")
    given = [f"run.folder={tmp_path / 'runs'}", "run.name=heir", "run.start_from=parent@10", "run.start_with=all"]
    trained(load_run(str(base.path), given).config)
    shutil.rmtree(tmp_path / "runs" / "parent")
    assert main([str(base.path), *given]) == 0
    again = minka("train", str(base.path), *given, "run.max_steps=22", "--ranks", "1")
    assert again.returncode == 0, again.stderr
    assert "resuming from step 20" in again.stdout


@pytest.mark.slow
def test_a_fork_whose_parent_is_damaged_is_refused_once_and_leaves_nothing(base: RunFolder, tmp_path: Path) -> None:
    parent = tmp_path / "runs" / "parent"
    shutil.copytree(base.path, parent)
    shard = parent / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    given = [f"run.folder={tmp_path / 'runs'}", "run.name=child", "run.max_steps=5"]
    refused = minka("train", str(base.path), *given, "run.start_from=parent", "--ranks", "2")
    assert refused.returncode == 2
    assert refused.stderr.count("damaged") == 1
    assert "step-00000020" in refused.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["parent"]
    trained(load_run(str(base.path), [*given, "run.start_from=parent@15"]).config)
    assert RunFolder(tmp_path / "runs" / "child").lineage()[0]["step"] == 15


def test_the_parents_checkpoint_is_leased_while_it_is_read(base: RunFolder) -> None:
    config = fork(base, "leased", "base@10", "run.max_steps=5")
    assert on_ranks(train_watching_leases, 2, config, base.path) == [1, 1]
    assert not list((base.path / "leases").iterdir())


def train_watching_leases(config: RunConfig, parent: Path) -> int:
    """How many leases the parent had while it was read."""
    right = restore_or_init.restore_from  # type: ignore[attr-defined]
    seen: list[Path] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        seen.extend((parent / "leases").iterdir())
        return right(*arguments, **more)

    restore_or_init.restore_from = watched  # type: ignore[attr-defined]
    assert train_rank(config) == 0
    return len(seen)


@pytest.mark.parametrize("saves", [False, True])
def test_a_fork_that_crashed_goes_on_from_its_own_checkpoint_or_else_from_its_parent(
    saves: bool, base: RunFolder
) -> None:
    every = f"checkpoint.every_steps={12 if saves else 0}"
    config = fork(base, f"crash-{saves}", "base@10", "run.start_with=all", "run.max_steps=20", every)
    crash(config, 14)
    events = trained(config)
    returns = [(e["event"], e["step"]) for e in events if e["event"] in ("restore", "restart")]
    assert returns == [("restore", 12) if saves else ("restart", 10)]
    assert steps(events) == {step: line for step, line in steps(ledger(base)).items() if step > 10}


def test_a_run_that_crashed_before_its_first_checkpoint_begins_again_and_says_so(base: RunFolder) -> None:
    config = load_run(str(base.path), ["run.name=new", "checkpoint.every_steps=0"]).config
    crash(config, 7)
    reason = "the run ended before its first checkpoint, and restarts from its initial weights"
    assert reason in said(config)
    events = ledger(RunFolder.of(config))
    assert [(e["step"], e["reason"]) for e in events if e["event"] == "restart"] == [(0, reason)]
    assert steps(events) == steps(ledger(base))


def test_milestones_that_the_parent_had_passed_keep_nothing_of_the_fork(base: RunFolder) -> None:
    passed = read_header(base.checkpoints / "step-00000010").state["tokens"] - 1
    milestones = f"checkpoint.keep_tokens=[{passed}, {passed + 13 * 32 * 2}]"
    settings = ("run.start_with=all", "run.max_steps=14", "checkpoint.every_steps=1", milestones)
    config = fork(base, "miles", "base@10", *settings)
    saves = [e for e in trained(config) if e["event"] == "save"]
    assert [(e["step"], e["permanent"]) for e in saves if e["permanent"]] == [(12, True)]
