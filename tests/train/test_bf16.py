"""bf16 compute on fp32 weights: cut four ways, the demo learns as it does on one rank."""

from pathlib import Path
from typing import Any

import pytest

from minka.data.prepare import open_or_prepare
from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import train_rank

STEPS, LAST, NATS = 200, 50, 0.005
SMALL = ["layout.micro_batch=8"]


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_two_hundred_steps_of_the_demo_cut_four_ways_are_those_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = losses(demo(tmp_path, "one"))
    four = losses(demo(tmp_path, "four", "layout.pipeline=2", "layout.tensor=2"))
    assert one != four
    apart = abs(sum(one[-LAST:]) - sum(four[-LAST:])) / LAST
    print(f"mean over the last {LAST} of {STEPS} steps: {sum(one[-LAST:]) / LAST:.4f} nats, {apart:.5f} apart")
    assert apart <= NATS


def demo(folder: Path, name: str, *layout: str) -> RunConfig:
    """The demo without evaluations, its weights untied: a pipeline has them on two stages."""
    settings = [f"run.name={name}", f"run.folder={folder / 'runs'}", f"run.max_steps={STEPS}", "layout.shard=1"]
    quiet = ["checkpoint.export=false", "eval.every_steps=0", "eval.max_documents=1", "eval.prompts=[]"]
    return load_run("demo", [*settings, *quiet, *SMALL, "model.tied=false", "layout.precision=bf16", *layout]).config


def losses(config: RunConfig) -> list[Any]:
    """Of every step of a run by the real worker."""
    open_or_prepare(config, Path())
    assert set(on_ranks(train_rank, config.layout.world, config, seconds=2600)) == {0}
    events = read_ledger(RunFolder.of(config).ledger_file)
    return [event["loss"] for event in events if event["event"] == "step"]
