"""A step replayed on one process is the same bit for bit or to rounding, and a planted difference is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import minka
from families import crash, fork, ledger, samples, stable_phase, trained
from minka.checkpoint.catalogue import checkpoints
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.train import replay as module
from minka.train.replay import print_result, replay
from ranks import on_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run on one rank, with checkpoints 5, 10, 15 and 20; tests that write into it take a copy."""
    return stable_phase(tmp_path_factory)


def again(folder: RunFolder, step: int) -> dict[str, Any]:
    """The replay of a step."""
    (result,) = on_ranks(replay_of, 1, folder.path, step)
    return dict(result)


def replay_of(path: Path, step: int) -> dict[str, Any]:
    return replay(RunFolder(path), step)


def copy(base: RunFolder, to: Path) -> RunFolder:
    shutil.copytree(base.path, to)
    return RunFolder(to)


def edit(folder: RunFolder, step: int, **factors: float) -> None:
    """Plant a difference into the line of a step."""
    (line,) = [e for e in ledger(folder) if e["event"] == "step" and e["step"] == step]
    write(folder, "step", step, **{key: line[key] * factor for key, factor in factors.items()})


def write(folder: RunFolder, kind: str, step: int, **values: object) -> None:
    """Replace values in the line of an event."""
    lines = [json.loads(line) for line in folder.ledger_file.read_text().splitlines()]
    for line in lines:
        if line["event"] == kind and line["step"] == step:
            line.update(values)
    folder.ledger_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def contents(folder: RunFolder) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(("step", "origin"), [(13, "step-00000010"), (15, "step-00000010"), (3, "its initial weights")])
def test_a_step_of_one_rank_is_the_same_bit_for_bit(step: int, origin: str, base: RunFolder) -> None:
    with base.only_writer():  # as if it were in training
        before = contents(base)
        result = again(base, step)
        assert contents(base) == before
    assert (result["verdict"], result["status"], result["first_difference"]) == ("bit for bit", 0, None)
    assert result["from"].endswith(origin)
    assert [line["step"] for line in result["steps"]] == list(range(11 if step > 5 else 1, step + 1))
    (line,) = [e for e in ledger(base) if e["event"] == "step" and e["step"] == step]
    for name in ("loss", "grad_norm", "learning_rate", "target_count"):
        assert result["steps"][-1][name] == {"recorded": line[name], "replayed": line[name], "difference": 0.0}
    assert [sample["sample"] for sample in result["samples"]] == samples(base)[step]


def test_the_samples_come_with_the_documents_they_were_cut_from(base: RunFolder) -> None:
    (sample, *_) = again(base, 6)["samples"]
    assert sum(piece["last"] - piece["first"] for piece in sample["pieces"]) == 32
    paths = [piece["provenance"]["path"] for piece in sample["pieces"]]
    assert all(Path(path).is_file() for path in paths)
    traced = minka("data", "inspect", str(base.path), "--sample", str(sample["sample"]), "--json")
    assert json.loads(traced.stdout)["pieces"] == sample["pieces"]


def test_a_step_of_two_ranks_is_equal_to_rounding(base: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_run(str(base.path), ["run.name=two", "checkpoint.export=false"]).config
    trained(config, ranks=2)
    result = again(RunFolder.of(config), 20)
    assert (result["verdict"], result["status"]) == ("equal to rounding", 0)
    assert (result["recorded"]["ranks"], result["replayed"]["ranks"]) == (2, 1)
    print_result(result)
    assert {"equal", "rounding", "(float32:", "2.0e-06,", "2.0e-05,"} <= set(capsys.readouterr().out.split())


def test_a_step_in_bf16_is_compared_within_the_bounds_of_bf16(
    base: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_run(str(base.path), ["run.name=bf16", "layout.precision=bf16", "run.max_steps=8"]).config
    trained(config, ranks=2)
    result = again(RunFolder.of(config), 8)
    assert result["verdict"] == "equal to rounding"
    assert result["replayed"]["compute_dtype"] == result["recorded"]["compute_dtype"] == "bfloat16"
    print_result(result)
    assert {"(bfloat16:", "1.0e-03,", "2.0e-02,"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_planted_difference_is_found_and_the_step_named(base: RunFolder, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "base")
    edit(folder, 13, loss=1 + 1e-4)
    done = minka("train", str(folder.path), "--replay", "14", "--json")
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert (result["verdict"], result["status"], result["first_difference"]) == ("differs", 1, 13)
    assert result["steps"][2]["loss"]["difference"] == pytest.approx(1e-4, rel=1e-3)
    done = minka("train", str(folder.path), "--replay", "14")
    assert done.returncode == 1
    assert "DIFFERS from step 13" in done.stdout
    assert "3 steps before it: loss 1.0e-04" in done.stdout
    done = minka("train", str(folder.path / "run.toml"), "--replay", "12")
    assert done.returncode == 0
    assert "bit for bit" in done.stdout.splitlines()[-1]


def test_a_difference_within_rounding_is_not_bit_for_bit(base: RunFolder, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "base")
    edit(folder, 12, grad_norm=1 + 1e-6)
    assert again(folder, 12)["verdict"] == "equal to rounding"


@pytest.mark.slow
def test_each_step_is_replayed_with_the_settings_it_was_taken_with(base: RunFolder, tmp_path: Path) -> None:
    here = f"run.folder={tmp_path}"
    config = load_run(str(base.path), [here, "run.max_steps=12", "checkpoint.export=false"]).config
    folder = RunFolder.of(config)
    trained(config)
    overrides = ["run.max_steps=16", "optimizer.beta1=0.5", "optimizer.learning_rate=1e-3", "schedule.kind=linear"]
    trained(load_run(str(folder.path), [*overrides, "model.z_loss=1e-2", "data.batch_tokens=192"]).config)
    for path in checkpoints(folder.checkpoints):
        if path.name in ("step-00000012", "step-00000015"):
            shutil.rmtree(path)
    result = again(folder, 16)
    assert [line["step"] for line in result["steps"]] == list(range(11, 17))
    assert result["verdict"] == "bit for bit"


def test_the_first_steps_of_a_fork_are_replayed_from_its_parent(base: RunFolder) -> None:
    config = fork(base, "child", "base@10", "run.start_with=all", "data.seq_len=16", "run.max_steps=14")
    trained(config)
    result = again(RunFolder.of(config), 12)
    assert (result["verdict"], result["from"]) == ("bit for bit", "its parent, base at step 10")
    hub = fork(base, "hub", str(base.export), "run.max_steps=6")
    trained(hub)
    assert again(RunFolder.of(hub), 5)["verdict"] == "bit for bit"


@pytest.mark.slow
def test_steps_after_a_crash_are_replayed_from_the_checkpoint_that_was_resumed(base: RunFolder, tmp_path: Path) -> None:
    config = load_run(str(base.path), [f"run.folder={tmp_path}", "checkpoint.every_steps=6"]).config
    crash(config, 11)
    folder = RunFolder.of(config)
    trained(load_run(str(folder.path), ["optimizer.learning_rate=1e-3", "run.max_steps=14"]).config)
    result = again(folder, 11)  # of the lineage that counts
    assert result["verdict"] == "bit for bit"
    assert result["steps"][-1]["learning_rate"]["replayed"] == 1e-3


def test_the_checkpoint_is_leased_while_it_is_read(base: RunFolder) -> None:
    ((during, after),) = on_ranks(leases_of_replay, 1, base.path)
    assert [name.startswith("step-00000010-") for name in during] == [True]
    assert after == []


def leases_of_replay(path: Path) -> tuple[list[str], list[str]]:
    """Names of the run's leases while its checkpoint is read, and after."""
    right = module.restore_from  # type: ignore[attr-defined]
    seen: list[str] = []

    def watched(*arguments: Any) -> Any:
        seen.extend(file.name for file in (path / "leases").iterdir())
        return right(*arguments)

    module.restore_from = watched  # type: ignore[attr-defined,assignment]
    replay(RunFolder(path), 11)
    return seen, [file.name for file in (path / "leases").iterdir()]


@pytest.mark.parametrize("step", [8, 21, 0])
def test_a_step_that_cannot_be_replayed_is_refused(step: int, base: RunFolder, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "base")
    for path in checkpoints(folder.checkpoints)[:2]:
        shutil.rmtree(path)
    with pytest.raises(UserError) as caught:
        replay(folder, step)
    assert str(step) in caught.value.what.split()
    assert (caught.value.where, "1 to " in caught.value.remedy) == (str(folder.path), True)


def test_a_step_with_nothing_to_compare_is_not_called_the_same(
    base: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(base, tmp_path / "base")
    write(folder, "step", 6, loss=None, grad_norm=None, learning_rate=None, target_count=None)
    with pytest.raises(UserError) as caught:
        replay(folder, 6)
    assert {"6", "loss", "grad_norm"} <= set(caught.value.what.split())
    result = again(folder, 8)
    assert (result["verdict"], result["steps"][0]) == ("bit for bit", {"step": 6})
    print_result(result)
    assert " 1 step before it: " in capsys.readouterr().out  # step 7; step 6 is not vouched for


def test_a_mangled_ledger_is_replayed_as_far_as_it_can_be_read(base: RunFolder, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "base")
    write(folder, "start", 0, threads=100_000, compute_dtype=["float32"])
    write(folder, "step", 12, loss=10**400)
    odd: list[dict[str, Any]] = [{"step": "x"}, {"event": [1]}, {"step": 10**400}]
    lines = [json.dumps({"event": "restore", "time": 1, "step": 0, "tokens": 0, **one}) for one in odd]
    with folder.ledger_file.open("a") as ledger_file:
        ledger_file.write("\n".join([*lines, "[" * 100_000]) + "\n")
    assert again(folder, 11)["verdict"] == "bit for bit"
    assert again(folder, 12)["verdict"] == "differs"
    folder = copy(base, tmp_path / "other")
    write(folder, "start", 0, config={"run": 5})
    with pytest.raises(UserError) as caught:
        replay(folder, 11)
    assert caught.value.where.startswith(str(folder.ledger_file))


def test_a_token_store_that_the_run_was_not_trained_on_is_refused(base: RunFolder, tmp_path: Path) -> None:
    folder = copy(base, tmp_path / "base")
    began = json.loads((folder.path / "provenance.json").read_text())
    began["data"]["manifest_sha256"] = 64 * "0"
    (folder.path / "provenance.json").write_text(json.dumps(began))
    with pytest.raises(UserError) as caught:
        replay(folder, 13)
    assert caught.value.where.endswith("store")


def test_overrides_are_refused(base: RunFolder) -> None:
    done = minka("train", str(base.path), "--replay", "13", "run.seed=3", "--json")
    assert (done.returncode, json.loads(done.stdout)["where"]) == (2, "--replay")
