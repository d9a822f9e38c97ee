"""A non-finite loss or gradient is a refused step: no bit changes, the data go on; too many of them stop the run."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.manifest import read_header
from minka.checkpoint.restore import whole_tensors
from minka.parallel.engine import Engine, Sums
from minka.parallel.inputs import ModelInputs
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.guard import judge
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank


def test_judge_names_what_is_not_finite_and_counts_refusals_in_a_row() -> None:
    assert judge(2.0, 1.0, refused_in_a_row=3, max_refused=5) == ("accept", "", 0)
    assert judge(math.nan, 1.0, refused_in_a_row=0, max_refused=5) == ("skip", "non-finite loss", 1)
    assert judge(2.0, math.inf, refused_in_a_row=1, max_refused=5) == ("skip", "non-finite gradient norm", 2)
    assert judge(math.nan, math.nan, refused_in_a_row=4, max_refused=5).action == "stop"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_refused_step_changes_no_bit_and_is_an_event(what: str, ranks: int, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    for changed, status in on_ranks(train_with_nan, ranks, config, what, [3, 7]):
        assert status == ExitStatus.DONE
        assert [step for step, same in changed if same] == [3, 7]
        assert len(changed) == 20
    folder = RunFolder.of(config)
    skips = [line for line in read_ledger(folder.ledger_file) if line["event"] == "skip"]
    assert [line["step"] for line in skips] == [3, 7]
    assert all(not math.isfinite(line["loss"] if what == "loss" else line["grad_norm"]) for line in skips)
    last = checkpoints(folder.checkpoints)[-1]
    assert read_header(last).state["step"] == 20
    assert float(dict(whole_tensors(last, "optimizer."))["count"]) == 18  # the optimizer's own count
    assert all(bool(tensor.isfinite().all()) for _, tensor in whole_tensors(last, ""))


def test_refused_steps_in_a_row_stop_the_run_for_a_person(tmp_path: Path) -> None:
    config = tiny(tmp_path, guard={"max_refused_steps": 4})
    ((_, status),) = on_ranks(train_with_nan, 1, config, "loss", list(range(6, 21)))
    assert status == ExitStatus.NEEDS_PERSON
    events = [line for line in read_ledger(RunFolder.of(config).ledger_file) if line["event"] in ("skip", "stop")]
    assert [(line["event"], line["step"]) for line in events[:4]] == [
        ("skip", 6),
        ("skip", 7),
        ("skip", 8),
        ("stop", 9),
    ]
    assert "4 refused steps in a row" in events[3]["reason"]


def train_with_nan(config: RunConfig, what: str, at: list[int]) -> tuple[list[tuple[int, bool]], int]:
    """(step, whether all local state kept its bits) of each step, and the status of the run."""
    forward_backward, apply = Engine.forward_backward, Engine.apply
    steps: list[tuple[int, bool]] = []

    def broken(self: Engine, micro_batches: list[ModelInputs], target_count: int) -> Sums:
        sums = forward_backward(self, micro_batches, target_count)
        if len(steps) + 1 in at and what == "loss":
            return Sums(sums.loss * math.nan, sums.z_loss)
        if len(steps) + 1 in at and self.mesh.rank == self.mesh.ranks - 1:  # one number on one rank
            next(g for g in self.gradients().values() if g.numel()).view(-1)[0] = math.inf
        return sums

    def watched(self: Engine, rate: float, max_norm: float, accept: Tensor) -> None:
        before = {name: piece.local.clone() for name, piece in self.tensors().items()}
        apply(self, rate, max_norm, accept)
        same = all(torch.equal(before[name], piece.local) for name, piece in self.tensors().items())
        steps.append((len(steps) + 1, same))

    Engine.forward_backward, Engine.apply = broken, watched  # type: ignore[assignment,method-assign]
    try:
        status = train_rank(config)
    finally:
        Engine.forward_backward, Engine.apply = forward_backward, apply  # type: ignore[method-assign]
    return steps, status
