"""A dry run holds and sends what real ranks hold and send, and takes no more than a laptop has."""

import json
import resource
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import pytest

from minka.plan.config_sections import KernelsSection
from minka.plan.errors import UserError
from minka.plan.execution_choices import logit_rows
from minka.plan.load_config import load_run
from minka.plan.memory_kinds import MEMORY_KINDS
from minka.train import dry_run as dry_runs
from minka.train.command import main
from minka.train.dry_run import DryRun, dry_run
from traced import UNIT_BYTES, config_of, dry, planned, real

ALLOCATOR, KIND = 0.03, 0.01  # of the peak
PLAN = (-0.03, 0.08)  # of the allocator's peak; the plan must not promise what does not fit
SECONDS, BYTES = 120, 8 * 2**30
UNITS = 1  # bytes: every block is an FSDP unit of its own, as in models that are worth it
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({}, UNIT_BYTES),
    "bf16, recompute": ({"precision": "bf16", "recompute": "block"}, UNIT_BYTES),
    "shard 2, units, always, recompute": (
        {"shard": 2, "precision": "bf16", "recompute": "block", "reshard": "always"},
        UNITS,
    ),
    "bf16 weights": ({"weights": "bf16", "moments": "bf16"}, UNIT_BYTES),
    "selective": ({"recompute": "selective"}, UNIT_BYTES),
    "shard 2 x tensor 2, selective": (
        {"shard": 2, "tensor": 2, "precision": "bf16", "recompute": "selective"},
        UNIT_BYTES,
    ),
    "shard 2, units, never": ({"shard": 2, "precision": "bf16", "reshard": "never"}, UNITS),
    "shard 2, units, reduced each time": (
        {"shard": 2, "precision": "bf16", "reshard": "always", "reduce": "micro_batch"},
        UNITS,
    ),
    "replicate 2 x shard 2": ({"replicate": 2, "shard": 2, "precision": "bf16"}, UNITS),
    "tensor 2": ({"tensor": 2}, UNIT_BYTES),
    "context 2": ({"context": 2}, UNIT_BYTES),
    "pipeline 2": ({"pipeline": 2}, UNIT_BYTES),
    "pipeline 2, zbv": ({"pipeline": 2, "schedule": "zbv"}, UNIT_BYTES),
    "pipeline 2 x tensor 2, interleaved": (
        {"pipeline": 2, "tensor": 2, "schedule": "interleaved", "micro_batch": 1},
        UNIT_BYTES,
    ),
    "pipeline 2 x shard 2 x tensor 2": ({"pipeline": 2, "shard": 2, "tensor": 2, "precision": "bf16"}, UNIT_BYTES),
    "shard 2 x context 2 x tensor 2": (
        {"shard": 2, "context": 2, "tensor": 2, "precision": "bf16", "recompute": "block"},
        UNIT_BYTES,
    ),
}
FAST = ("one rank",)


def rows() -> list[Any]:
    return [pytest.param(row, marks=() if row in FAST else pytest.mark.slow) for row in ROWS]


@pytest.mark.parametrize("row", rows())
def test_it_holds_and_sends_what_real_ranks_do(row: str) -> None:
    layout, unit_bytes = ROWS[row]
    config = config_of(layout)
    ranks = real(config, unit_bytes=unit_bytes)
    for rank in sorted({0, len(ranks) - 1}):
        found, predicted = ranks[rank], dry(config, rank, unit_bytes=unit_bytes)
        off = predicted.memory.total / found.allocated - 1
        kinds = {k: (predicted.memory.by_kind[k] - found.peak.by_kind[k]) / found.peak.total for k in MEMORY_KINDS}
        largest = {k: (predicted.memory.largest[k] - found.peak.largest[k]) / found.peak.total for k in MEMORY_KINDS}
        worst = max([*kinds.values(), *largest.values()], key=abs)
        plan = planned(config, unit_bytes=unit_bytes)[-1 if rank else 0].total / found.allocated - 1
        print(f"{row}, rank {rank}: {off:+.2%} of the allocator's peak, {worst:+.2%} in one kind, plan {plan:+.2%}")
        assert PLAN[0] <= plan <= PLAN[1]
        assert abs(off) <= ALLOCATOR
        assert abs(worst) <= KIND, (kinds, largest)
        assert (predicted.calls, predicted.payload_bytes) == (found.calls, found.payload_bytes)


EXTRAPOLATED: dict[str, tuple[dict[str, Any], int]] = {
    "shard 2, units, always": ({"shard": 2, "precision": "bf16", "reshard": "always"}, UNITS),
    "shard 2, units, never": ({"shard": 2, "precision": "bf16", "reshard": "never"}, UNITS),
    "replicate 2 x shard 2, reduced each time": (
        {"replicate": 2, "shard": 2, "precision": "bf16", "reduce": "micro_batch", "micro_batch": 1},
        UNITS,
    ),
    "context 2 x tensor 2, recompute": ({"context": 2, "tensor": 2, "recompute": "block"}, UNIT_BYTES),
    "pipeline 2": ({"pipeline": 2}, UNIT_BYTES),
    "pipeline 2, gpipe": ({"pipeline": 2, "schedule": "gpipe"}, UNIT_BYTES),
    "pipeline 2, interleaved": ({"pipeline": 2, "schedule": "interleaved", "micro_batch": 1}, UNIT_BYTES),
    "pipeline 2 x shard 2, zbv": ({"pipeline": 2, "shard": 2, "schedule": "zbv", "micro_batch": 1}, UNIT_BYTES),
    "pipeline 2, dualpipev": ({"pipeline": 2, "schedule": "dualpipev"}, UNIT_BYTES),
}


@pytest.mark.parametrize(
    ("row", "rank"),
    [
        pytest.param(row, rank, marks=() if (row, rank) == ("shard 2, units, always", 0) else pytest.mark.slow)
        for row in EXTRAPOLATED
        for rank in (0, 1)
    ],
)
def test_some_micro_batches_predict_all(row: str, rank: int) -> None:
    layout, unit_bytes = EXTRAPOLATED[row]
    config = config_of(layout)
    few, all_of_them = _traced(config, rank, unit_bytes, layers=0), _traced(config, rank, unit_bytes, micro_batches=99)
    assert min(few.memory.by_kind.values()) >= 0
    assert (few.traced < few.micro_batches, all_of_them.traced) == (True, all_of_them.micro_batches)
    assert few.memory.total == pytest.approx(all_of_them.memory.total, rel=1e-3)
    slack = 1e-3 * all_of_them.memory.total
    assert few.memory.by_kind == pytest.approx(all_of_them.memory.by_kind, abs=slack)
    assert few.memory.largest == pytest.approx(all_of_them.memory.largest, abs=slack)
    assert (few.calls, few.payload_bytes) == (all_of_them.calls, all_of_them.payload_bytes)


def _traced(config: Any, rank: int, unit_bytes: int, layers: int = 10**9, micro_batches: int = 3) -> DryRun:
    with patch.object(dry_runs, "TRACED_LAYERS", layers), patch.object(dry_runs, "TRACED", micro_batches):
        return dry(config, rank, unit_bytes=unit_bytes)


def test_as_on_a_gpu_a_rank_has_the_logits_of_its_own_vocabulary() -> None:
    """Of the whole vocabulary a chunk would have fewer tokens than the rank has."""
    vocab, tokens = 2**20, 16 * 128
    config = config_of({"tensor": 8, "micro_batch": 16}, heads=8, kv_heads=8, vocab=vocab)
    assert logit_rows(vocab, "cuda") < tokens <= logit_rows(vocab // 8, "cuda")
    found = dry_run(config, 8, 0).memory.largest["logits"]
    assert found >= 4 * tokens * vocab // 8  # in fp32


def test_as_on_a_gpu_full_precision_has_a_mask() -> None:
    wanted = dry_run(config_of({"precision": "fp32"}), 1, 0).memory
    masked = config_of({"precision": "fp32"}).model_copy(update={"kernels": KernelsSection(attention="sdpa")})
    assert wanted == dry_run(masked, 1, 0).memory


def test_a_second_dry_run_in_a_process_is_the_first() -> None:
    config = config_of({"pipeline": 2, "shard": 2, "tensor": 2, "context": 2})
    first, other, second = dry(config, 5), dry(config, 12), dry(config, 5)
    assert first == second != other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "world", "rank"), [("llama3-8b", 8, 3), ("llama3-70b", 256, 100), ("llama3-405b", 16384, 777)]
)
def test_the_largest_runs_are_traced_on_a_laptop(recipe: str, world: int, rank: int) -> None:
    command = [sys.executable, "-m", "minka", "train", recipe, "--dry-run", "--world", str(world), "--rank", str(rank)]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["ranks"]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss * 1024  # of the largest child so far: this one or a smaller one
    print(f"{recipe} on {world}: {seconds:.0f} s ({used:.0f} s of one core), {peak / 2**30:.2f} GiB")
    print(f"its rank {rank}: {found['peak_bytes'] / 2**30:.1f} GiB {found['peak_bytes_by_kind']}")
    assert used < SECONDS
    assert peak < BYTES
    assert found["peak_bytes"] < 80e9  # what is to be trained fits its GPU
    parameters = sum(s["bytes"] for name, s in found["shards"].items() if name.startswith("model."))
    assert parameters == pytest.approx(4 * load_parameters(recipe) / world, rel=0.25)  # stages differ


def load_parameters(recipe: str) -> int:
    from minka.plan.flops import parameters

    return parameters(load_run(recipe).config.model)


def test_the_command_prints_a_rank_or_one_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["demo", "layout.pipeline=2", "layout.micro_batch=8", "model.tied=false"]
    assert main([*small, "--dry-run", "--world", "2", "--rank", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (one,) = document["ranks"]
    assert (one["rank"], document["warmup_refused"], document["padding_share"]) == (1, "", 0)
    assert sum(one["peak_bytes_by_kind"].values()) == one["peak_bytes"]
    assert {t["axis"] for t in one["transfers"]} >= {"pipeline"}
    assert main([*small, "--dry-run", "--world", "2"]) == 0
    text, progress = capsys.readouterr()
    assert "tracing rank 1 (2 of 2)" in progress
    assert all(
        word in text for word in ("rank 0", "rank 1", *MEMORY_KINDS, "model.blocks.", "most memory: rank", "send")
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--world", "2"], "add --dry-run"),
        (["--dry-run", "--world", "2", "--rank", "2"], "rank 2 is not among 2"),
        (["--dry-run", "--world", "2", "--rank", "first"], "'first' is not a rank"),
        (["--dry-run", "--rank", "1"], "--world"),
        (["--dry-run", "--world", "2", "--ranks", "2"], "--ranks cannot be given"),
        (["--dry-run", "--world", "3", "layout.tensor=2"], "layout"),
        (["--dry-run", "--world", "2", "--rank", "²"], "is not a rank"),
        (["--dry-run", "--world", "2", "layout.engine=deepspeed"], "no dry run"),
        (["--dry-run", "--world", "2", "layout.offload=all"], "no dry run"),
    ],
)
def test_what_it_cannot_trace_it_refuses(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *given]) == 2
    assert said in capsys.readouterr().err


def test_padding_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "layout.micro_batch=3", "--dry-run", "--world", "1"]) == 0
    assert "of each step is spent on padding sequences" in capsys.readouterr().out


def test_a_layout_that_is_not_legal_during_the_batch_warmup_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    warm = "data.batch_warmup=[{until_tokens=40960,batch_tokens=1024}]"
    layout = ["layout.pipeline=2", "layout.micro_batch=8", "model.tied=false", warm]
    assert main(["demo", *layout, "--dry-run", "--world", "2", "--rank", "0"]) == 0
    assert "not legal during the batch warm-up" in capsys.readouterr().out


def test_it_is_refused_where_a_process_group_exists() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(UserError, match="while training"):
            dry_run(config_of({"shard": 2}), 2, 0)
    finally:
        dist.destroy_process_group()
