"""What each step trained on, as every rank recorded it: one order, whatever the ranks, stops and restarts."""

import json
from pathlib import Path

import pytest

from minka.launch.signals import SupervisorLink
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store."""
    return tmp_path_factory.mktemp("samples")


def run(folder: Path, name: str, **data: object) -> RunConfig:
    return tiny(folder, run={"name": name, "max_steps": STEPS}, data=data)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_stream_is_identical_on_any_number_of_ranks(ranks: int, folder: Path) -> None:
    config = run(folder, f"ranks-{ranks}")
    on_ranks(train_until, ranks, config)
    assert stream(config, ranks) == expected(config)


def test_the_stream_is_identical_for_any_batch_size(folder: Path) -> None:
    config = run(folder, "batches", batch_tokens=7 * 32, batch_warmup=[])
    on_ranks(train_until, 2, config)
    flat = [sample for step in stream(config, 2) for sample in step]
    assert flat == list(range(7 * STEPS))


def test_a_half_on_one_rank_and_a_half_on_three_are_one_run(folder: Path) -> None:
    config = run(folder, "halves")
    assert on_ranks(train_until, 1, config, 3) == [85]
    assert stream(config, 1) == expected(config)[:3]
    assert on_ranks(train_until, 3, config) == [0, 0, 0]
    assert stream(config, 3) == expected(config)


def train_until(config: RunConfig, stop_after: int = 0) -> int:
    """One rank of the run; with `stop_after`, as if a person had asked for a stop in that step."""
    if stop_after:
        alive = SupervisorLink.heartbeat

        def counted(self: SupervisorLink, step: int, *, done: bool = False) -> None:
            alive(self, step, done=done)
            self._signalled = step >= stop_after

        SupervisorLink.heartbeat = counted  # type: ignore[method-assign]
    return train_rank(config)


def stream(config: RunConfig, ranks: int) -> list[list[int]]:
    """The samples of each step in order: rank r's are every ranks-th, beginning with the r-th."""
    by_rank = []
    for rank in range(ranks):
        lines = (RunFolder.of(config).logs / f"samples-{rank:05d}.jsonl").read_text().splitlines()
        by_rank.append({entry["step"]: entry["samples"] for entry in map(json.loads, lines)})
    steps = []
    for step in sorted(by_rank[0]):
        mine = [ids.get(step, []) for ids in by_rank]
        steps.append([ids[i] for i in range(max(map(len, mine))) for ids in mine if i < len(ids)])
    return steps


def expected(config: RunConfig) -> list[list[int]]:
    """Positions in the order, from the batch schedule alone."""
    steps, tokens = [], 0
    for _ in range(STEPS):
        size = config.batch_tokens_at(tokens)
        steps.append(list(range(tokens // 32, (tokens + size) // 32)))
        tokens += size
    return steps
