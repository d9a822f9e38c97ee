"""Who started the ranks, and how many there are to start, by environment variables and devices."""

import os
from pathlib import Path

import pytest

from minka.launch.environment import choose_ranks, first_host, launcher, slurm_environment, visible_gpus
from minka.plan.errors import UserError


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("node[07-09,12],login1", "node07"), ("a1,b2", "a1"), ("gpu[3]-ib,x", "gpu3-ib")],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_joins_torchrun_and_srun_but_not_a_batch_script() -> None:
    assert launcher({"RANK": "1", "WORLD_SIZE": "2"}) == "torchrun"
    assert launcher({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}) is None
    assert launcher({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty bash
    step = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }
    assert launcher(step) == "slurm"
    found = slurm_environment(step)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("3", "1", "4", "n1")
    assert 20_000 <= int(found["MASTER_PORT"]) < 60_000
    assert slurm_environment({**step, "SLURM_PROCID": "0"})["MASTER_PORT"] == found["MASTER_PORT"]


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
