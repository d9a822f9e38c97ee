"""Weights and moments in bf16: every layout draws the random bits of one process, and so does a resumed run."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.eval.score_checkpoint import score_checkpoint
from minka.parallel.apply import build_parts
from minka.parallel.mesh import start_mesh
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from parity import Run, config_of, run_on
from tiny import tiny, train_rank

BF16 = {"weights": "bf16", "moments": "bf16"}
CONSTANT = {"kind": "constant", "warmup": 0}  # a rate that does not depend on the length


def run_of(layout: dict[str, Any], stored: dict[str, str]) -> Run:
    optimizer = {"learning_rate": 1e-3, "eps": 1e-5, "max_norm": 0.5, **stored}
    return run_on(config_of(layout, {"qk_norm": True}, optimizer=optimizer))


@cache
def alone(weights: str, moments: str) -> Run:
    return run_of({}, {"weights": weights, "moments": moments})


def differing(one: Run, other: Run) -> dict[str, float]:
    """The share of numbers that differ, by kind."""
    kinds: dict[str, list[Any]] = {}
    for name, tensor in one.tensors.items():
        kinds.setdefault(name.split(".")[0], []).append((tensor != other.tensors[name]).ravel())
    return {kind: float(np.concatenate(parts).mean()) for kind, parts in kinds.items()}


@pytest.mark.parametrize(
    "layout",
    [
        {"shard": 2, "tensor": 2},
        pytest.param({"replicate": 2, "shard": 2}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "schedule": "zbv"}, marks=pytest.mark.slow),
        pytest.param({"shard": 2, "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_random_bits_do_not_depend_on_the_layout(layout: dict[str, Any]) -> None:
    """A sum in a different order may round a number the other way: few of them. Other bits would do so to half."""
    found = run_of(layout, BF16)
    share = differing(found, alone(**BF16))
    print(layout, share)
    assert np.abs(found.loss / alone(**BF16).loss - 1).max() <= 2e-3
    if "precision" not in layout:  # that one computes in bf16, and what is compared with in fp32
        assert share["model"] <= 0.02
        assert max(share["moment1"], share["moment2"]) <= 0.1


@pytest.mark.parametrize(("weights", "moments"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_what_is_stored_in_bf16_trains_as_in_fp32(weights: str, moments: str) -> None:
    found, exact = alone(weights, moments), alone("fp32", "fp32")
    stored = {kind: weights if kind == "model" else moments for kind in ("model", "moment1", "moment2")}
    for name, tensor in found.tensors.items():
        kind = name.split(".")[0]
        if kind in stored:
            rounded = torch.from_numpy(tensor).bfloat16().double().numpy()
            assert np.array_equal(rounded, tensor) == (stored[kind] == "bf16"), name
    assert np.abs(found.loss / exact.loss - 1).max() <= 2e-3
    assert np.abs(found.loss / exact.loss - 1).max() > 0


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 3e-3, **BF16}
    whole = tiny(tmp_path, run={"name": "whole", "max_steps": 12}, optimizer=optimizer, schedule=CONSTANT)
    for length in (5, 12):
        halves = tiny(tmp_path, run={"name": "halves", "max_steps": length}, optimizer=optimizer, schedule=CONSTANT)
        assert train_rank(halves) == 0
    assert train_rank(whole) == 0
    final = [dict(whole_tensors(checkpoints(RunFolder.of(c).checkpoints)[-1], "")) for c in (whole, halves)]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name
    assert {t.dtype for name, t in final[0].items() if name.startswith(("model.", "moment"))} == {torch.bfloat16}


def test_a_checkpoint_is_scored_as_the_run_scored_it(tmp_path: Path) -> None:
    """In fp32, and not with weights rounded to what the run stores today."""
    for length, optimizer in ((4, {"learning_rate": 3e-3}), (8, {"learning_rate": 3e-3, **BF16})):
        cadence = {"every_steps": 4}
        config = tiny(tmp_path, run={"name": "scored", "max_steps": length}, optimizer=optimizer, schedule=CONSTANT,
                      eval=cadence, checkpoint={"every_steps": 4, "keep": 9})  # fmt: skip
        assert train_rank(config, "optimizer") == 0
    folder = RunFolder.of(config)
    for step in (4, 8):
        own = json.loads((folder.evals / f"step-{step:08d}" / "heldout@1.json").read_text())
        found = score_checkpoint(f"{folder.path}@{step}", [], lambda: None, tmp_path / f"{step}.json")
        assert found["scores"] == own["scores"]


def test_weights_that_nothing_would_cast_are_refused() -> None:
    config = config_of({}, optimizer={"learning_rate": 1e-3, "weights": "bf16"})
    with start_mesh(config.layout) as mesh, pytest.raises(RuntimeError, match="casts=True"):
        build_parts(config, mesh)


def test_a_run_changes_its_dtypes_both_ways_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain: dict[str, object] = {"learning_rate": 3e-3}
    lengths: dict[int, dict[str, object]] = {4: plain, 8: {**plain, **BF16}, 12: plain}
    for length, optimizer in lengths.items():
        config = tiny(tmp_path, run={"name": "changing", "max_steps": length}, optimizer=optimizer, schedule=CONSTANT)
        assert train_rank(config, "optimizer") == 0
    said = capsys.readouterr().out
    for kind in ("model", "moment1", "moment2"):
        assert f"{kind} tensors are converted: float32 in step-00000004, bfloat16 here" in said
        assert f"{kind} tensors are converted: bfloat16 in step-00000008, float32 here" in said
    folder = RunFolder.of(config)
    losses = [line["loss"] for line in read_ledger(folder.ledger_file) if line["event"] == "step"]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    saved = {path.name: dict(whole_tensors(path, "moment2.")) for path in checkpoints(folder.checkpoints)}
    assert {t.dtype for t in saved["step-00000012"].values()} == {torch.float32}
