"""Whole runs under ZeRO by the real worker: resumed, evaluated, with layer statistics."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the deepspeed extra")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_the_real_worker_resumes_where_it_stopped(stage: int, tmp_path: Path) -> None:
    tracking = {"log_every": 5, "detail_every": 5}
    layout = {"micro_batch": 2, "shard": 2, "engine": "deepspeed", "zero_stage": stage}
    assert on_ranks(train_rank, 2, tiny(tmp_path, run={"name": "a"}, layout=layout, tracking=tracking)) == [0, 0]
    half = {"name": "b", "max_steps": 10}
    short = tiny(tmp_path, run=half, layout=layout, schedule={"kind": "constant"})
    whole = tiny(tmp_path, run={**half, "max_steps": 20}, layout=layout, schedule={"kind": "constant"})
    straight = tiny(tmp_path, run={"name": "c"}, layout=layout, schedule={"kind": "constant"})
    for config in (short, whole, straight):
        assert on_ranks(train_rank, 2, config) == [0, 0]
    resumed, unbroken = (
        dict(whole_tensors(checkpoints(RunFolder.of(config).checkpoints)[-1], "")) for config in (whole, straight)
    )
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in resumed.items())
    one = tiny(tmp_path, run={"name": "d"}, tracking=tracking)
    assert on_ranks(train_rank, 1, one) == [0]
    ours, theirs = (list(read_ledger(RunFolder.of(c).ledger_file)) for c in (tiny(tmp_path, run={"name": "a"}), one))
    losses, expected = ([line["loss"] for line in lines if line["event"] == "step"] for lines in (ours, theirs))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    details = [[line for line in lines if line["event"] == "detail"] for lines in (ours, theirs)]
    assert len(details[0]) == len(details[1]) == 5
    for mine, reference in zip(*details, strict=True):
        for key in ("grad_norm", "update_ratio", "max_attention_logit"):
            np.testing.assert_allclose(list(mine[key].values()), list(reference[key].values()), rtol=2e-5)


@pytest.mark.slow
def test_samples_after_training_are_those_of_fsdp(tmp_path: Path) -> None:
    """An untied head's weights are being prefetched, as in training, when logits are asked for."""
    said = []
    for engine in ("deepspeed", "fsdp"):
        layout = {"micro_batch": 2, "shard": 2, "engine": engine}
        evaluation = {"every_steps": 5, "prompts": ["ab"], "sample_tokens": 8}
        run = {"name": engine, "max_steps": 10}
        config = tiny(tmp_path, run=run, layout=layout, model={"tied": False}, eval=evaluation)
        assert on_ranks(train_rank, 2, config) == [0, 0]
        files = sorted(RunFolder.of(config).evals.rglob("*.json"))
        said.append([json.loads(file.read_text())["samples"] for file in files])
    assert said[0] == said[1]
    assert len(said[0]) == 2
    assert all(said[0])
