"""Who started the ranks, and how many there are to start, by environment variables and devices."""

import os
from pathlib import Path

import pytest
import torch

from minka.eval.command import main as eval_main
from minka.launch.environment import (
    check_one_process,
    choose_ranks,
    first_host,
    launcher,
    slurm_environment,
    threads_per_rank,
    usable_cpus,
    visible_gpus,
)
from minka.plan.errors import ExitStatus, UserError
from minka.train.command import main as train_main
from minka.train.worker import check_gpus
from saved import saved_run

RANK_1_OF_2 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[07-09,12],login1", "node07"),
        ("a1,b2", "a1"),
        ("gpu[3]-ib,x", "gpu3-ib"),
        ("r[1-2]n[03,5],x", "r1n03"),
    ],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "1"}, RANK_1_OF_2],
)
def test_an_evaluation_and_a_replay_are_not_started_with_variables_of_several_ranks(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(saved_run(tmp_path, 3).path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for status in (eval_main([run]), train_main([run, "--replay", "2"])):
        assert status == ExitStatus.REFUSED
    assert capsys.readouterr().err.count("RANK and WORLD_SIZE") == 2
    check_one_process({"RANK": "0", "WORLD_SIZE": "1"}, "an evaluation")
    check_one_process(STEP, "an evaluation")


STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_joins_torchrun_and_srun_but_not_a_batch_script() -> None:
    assert launcher({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}) is None
    assert launcher({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty bash
    assert launcher(STEP) == "slurm"
    found = slurm_environment(STEP)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("3", "1", "4", "n1")
    assert 20_000 <= int(found["MASTER_PORT"]) < 60_000
    assert slurm_environment({**STEP, "SLURM_PROCID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"SLURM_STEP_NODELIST": None}, "SLURM_JOB_NODELIST"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID"),
        ({"SLURM_LOCALID": "4"}, "SLURM_LOCALID"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "77_3"}, "SLURM_JOB_ID"),
        ({"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID"),
    ],
)
def test_a_task_whose_variables_are_wrong_is_refused_by_the_name_of_one(
    changed: dict[str, str | None], named: str
) -> None:
    environment = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        slurm_environment(environment)
    assert caught.value.where == named


def test_no_test_of_the_cpu_sees_a_gpu_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert visible_gpus({}, tmp_path) == 1
    assert visible_gpus(os.environ, tmp_path) == 0  # children have the same environment


def test_one_rank_a_gpu_else_two_and_never_more_than_gpus(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,2"}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert [choose_ranks(None, 0), choose_ranks(None, 3), choose_ranks(2, 3), choose_ranks(5, 0)] == [2, 3, 2, 5]
    with pytest.raises(UserError, match="there are 3 GPUs"):
        choose_ranks(4, 3)


TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"RANK": None}, "RANK"),
        ({"RANK": "abc"}, "RANK"),
        ({"RANK": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
        ({"MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT"),  # what Kubernetes makes of a service called master
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
    ],
)
def test_a_rank_whose_variables_are_wrong_is_refused_by_the_name_of_one(
    changed: dict[str, str | None], named: str
) -> None:
    assert launcher(TORCH) == "torchrun"
    environment = {name: value for name, value in {**TORCH, **changed}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        launcher(environment)
    assert caught.value.where == named


def test_empty_variables_and_a_world_of_one_are_understood() -> None:
    assert launcher({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}) is None
    assert launcher({"RANK": "0", "WORLD_SIZE": "1"}) == "torchrun"
    assert launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}) is None  # the shell of sbatch
    interactive = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}
    assert launcher(interactive) is None  # the shell of salloc
    with pytest.raises(UserError) as caught:
        launcher({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8(x2)"})
    assert caught.value.where == "SLURM_STEP_NUM_TASKS"


@pytest.mark.parametrize(
    ("value", "threads"), [(None, 4), ("", 4), ("0", 4), ("3", 3), ("4,2", 4), (" 5 ", 5), ("64", 64)]
)
def test_threads_of_a_rank(value: str | None, threads: int) -> None:
    environment = {} if value is None else {"OMP_NUM_THREADS": value}
    assert threads_per_rank(environment, ranks=2, cpus=8) == threads
    assert threads_per_rank({}, ranks=16, cpus=8) == 1


@pytest.mark.parametrize("value", ["auto", "-1", "2.5", "four", "²", "2147483648"])
def test_a_number_of_threads_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError) as caught:
        threads_per_rank({"OMP_NUM_THREADS": value}, ranks=2, cpus=8)
    assert caught.value.where == "OMP_NUM_THREADS"


def test_cpus_are_those_of_the_container_and_need_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert usable_cpus(tmp_path) == 96
    for text, cpus in (("max 100000", 96), ("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1), ("x", 96)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert usable_cpus(tmp_path) == cpus, text


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,1", 2),
        ("GPU-8932f937-d72c,GPU-1f", 2),
        ("MIG-GPU-1/5/0,MIG-2", 1),
        ("NoDevFiles", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("1,9,0", 1),
        ("none", 0),
    ],
)
def test_visible_devices_are_counted_as_cuda_does(visible: str, count: int, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"nvidia{number}").touch()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_gpus_that_torch_cannot_use_are_refused_with_the_reason() -> None:
    check_gpus(0)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="2 GPUs, which torch cannot use") as caught:
            check_gpus(2)
        assert caught.value.why
        assert "CUDA_VISIBLE_DEVICES=" in caught.value.remedy
