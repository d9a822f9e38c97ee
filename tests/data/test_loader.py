"""The loader: the same samples on any number of ranks, after any restart, and a thread that ends."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from corpora import data_section, run_config
from minka.data.batch import PADDING, Batch
from minka.data.loader import Loader, LoaderState, order_of
from minka.data.prepare import prepare
from minka.data.token_store import Split, TokenStore

SEQ = 16
WARMUP = [{"until_tokens": 6 * SEQ, "batch_tokens": 3 * SEQ}, {"until_tokens": 20 * SEQ, "batch_tokens": 5 * SEQ}]
Step = tuple[list[int], list[list[int]]]  # ids of the global batch in order, and their tokens


@pytest.fixture
def train(store: TokenStore) -> Split:
    return store.split("train")


def steps(
    split: Split, ways: int, count: int, state: LoaderState | None = None, **data: Any
) -> tuple[list[Step], LoaderState]:
    """`count` global batches put together from `ways` ranks, and the state after them."""
    micro_batch = data.pop("micro_batch", 1)
    config = run_config(
        data={"tokenizer": "bytes", "seq_len": SEQ, "batch_tokens": 8 * SEQ, **data},
        layout={"micro_batch": micro_batch},
    )
    loaders = [Loader(config, split, rank, ways, state) for rank in range(ways)]
    made, after = [], state or LoaderState()
    for _ in range(count):
        parts = [next(loader) for loader in loaders]
        assert len({part.state for part in parts}) == 1  # every rank has the same state
        after = parts[0].state
        made.append(together([part.batch for part in parts], micro_batch))
    for loader in loaders:
        loader.close()
    return made, after


def together(parts: list[Batch], micro_batch: int) -> Step:
    """Rank r holds every ways-th sequence; padding comes last and on equal numbers of rows."""
    rows = {len(part.samples) for part in parts}
    assert len(rows) == 1
    assert rows.pop() % micro_batch == 0
    samples = torch.stack([part.samples for part in parts], dim=1).flatten().tolist()
    tokens = torch.stack([part.tokens for part in parts], dim=1).flatten(0, 1).tolist()
    real = [i for i, sample in enumerate(samples) if sample != PADDING]
    assert real == list(range(len(real)))
    return [samples[i] for i in real], [tokens[i] for i in real]


def flat(made: list[Step]) -> list[tuple[int, list[int]]]:
    """(id, tokens) of every sample, in order."""
    return [row for samples, tokens in made for row in zip(samples, tokens, strict=True)]


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("ways", [2, 3, 4])
def test_any_number_of_ranks_reads_the_same_stream(train: Split, ways: int, micro_batch: int) -> None:
    alone, state = steps(train, 1, 12, batch_warmup=WARMUP)
    cut, cut_state = steps(train, ways, 12, batch_warmup=WARMUP, micro_batch=micro_batch)
    assert cut == alone
    assert cut_state == state


def test_batches_are_consecutive_samples_and_follow_the_warm_up(train: Split) -> None:
    made, state = steps(train, 2, 8, batch_warmup=WARMUP)
    # 3 samples until 6 are consumed, then 5 until 20, then 8.
    assert [len(samples) for samples, _ in made] == [3, 3, 5, 5, 5, 8, 8, 8]
    assert [i for samples, _ in made for i in samples] == list(range(45))
    assert state == LoaderState(samples=45, tokens=45 * SEQ)  # padding is not consumed


def test_another_batch_size_reads_the_same_samples_in_the_same_order(train: Split) -> None:
    small, _ = steps(train, 1, 12, batch_tokens=2 * SEQ)
    large, _ = steps(train, 1, 3, batch_tokens=8 * SEQ)
    assert flat(small) == flat(large)


def test_a_run_of_one_rank_goes_on_with_three_as_if_nothing_happened(train: Split) -> None:
    whole, end = steps(train, 1, 10, batch_warmup=WARMUP)
    first, half = steps(train, 1, 4, batch_warmup=WARMUP)
    second, after = steps(train, 3, 6, state=half, batch_warmup=WARMUP)
    assert first + second == whole
    assert after == end


def test_the_state_is_two_numbers_that_survive_json(train: Split) -> None:
    _, state = steps(train, 1, 3)
    assert LoaderState(**json.loads(json.dumps(state.__dict__))) == state
    assert state.after(2, SEQ) == LoaderState(state.samples + 2, state.tokens + 2 * SEQ)


def test_an_epoch_has_every_window_once_and_the_next_is_in_another_order(train: Split) -> None:
    config = run_config(data={"tokenizer": "bytes", "seq_len": SEQ, "batch_tokens": SEQ})
    windows = order_of(config, train).windows
    made, _ = steps(train, 1, 2, batch_tokens=windows * SEQ)
    (_, first), (_, second) = made
    assert sorted(first) == sorted(second)
    assert first != second
    starts = {tuple(int(t) for t in train.tokens[k * SEQ : (k + 1) * SEQ]) for k in range(windows - 1)}
    assert starts <= {tuple(row) for row in first}


def test_dropped_samples_are_never_seen_and_the_rest_keeps_its_order(train: Split) -> None:
    plain, _ = steps(train, 1, 5)
    dropped, _ = steps(train, 2, 4, dropped_samples=[[3, 5], [9, 10]])
    kept = [row for row in flat(plain) if row[0] not in (3, 4, 9)]
    seen = flat(dropped)
    assert seen == kept[: len(seen)]


def test_the_seed_changes_the_order(train: Split) -> None:
    config = run_config(run={"name": "tiny", "max_steps": 1, "seed": 1})
    other = run_config(run={"name": "tiny", "max_steps": 1, "seed": 2})
    positions = np.arange(50)
    assert not np.array_equal(
        order_of(config, train).windows_at(positions), order_of(other, train).windows_at(positions)
    )


def test_what_the_thread_raises_is_raised_to_the_consumer_each_time(train: Split) -> None:
    class Broken(Exception):
        pass

    class Tokens:
        dtype = np.dtype(np.uint16)

        def __len__(self) -> int:
            return 1_000

        def __getitem__(self, key: object) -> object:
            raise Broken("the disk is gone")

    loader = Loader(run_config(), replace(train, tokens=cast(Any, Tokens())), 0, 1)
    for _ in range(2):
        with pytest.raises(Broken, match="the disk is gone"):
            next(loader)
    loader.close()


def test_close_ends_the_thread_and_the_iteration(train: Split) -> None:
    before = threading.active_count()
    with Loader(run_config(), train, 0, 1) as loader:
        next(loader)
        assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []


def test_the_thread_builds_a_bounded_number_of_batches_ahead(train: Split) -> None:
    read: list[int] = []

    class Counting:
        dtype = train.tokens.dtype

        def __len__(self) -> int:
            return len(train.tokens)

        def __getitem__(self, key: Any) -> Any:
            read.append(1)
            return train.tokens[key]

    config = run_config()  # four sequences a batch
    with Loader(config, replace(train, tokens=cast(Any, Counting())), 0, 1) as loader:
        ahead = loader._ahead[-1]
        ahead.result()
        assert loader._thread._work_queue.empty()  # it has nothing more to do
        assert len(read) == 3 * config.batch_tokens_at(0) // config.data.seq_len


def test_micro_batches_are_prepared_in_the_thread(train: Split) -> None:
    def prepare(part: Batch) -> tuple[list[int], str]:
        return part.samples.tolist(), threading.current_thread().name

    config = run_config(layout={"micro_batch": 2})
    with Loader(config, train, 0, 1, prepare=prepare) as loader:
        batch, prepared, _ = next(loader)
    assert [samples for samples, _ in prepared] == [part.samples.tolist() for part in batch.micro_batches(2)]
    assert {name for _, name in prepared} == {"loader of rank 0_0"}


def test_a_rank_outside_its_ways_is_refused(train: Split) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2 ways"):
        Loader(run_config(), train, 2, 2)


def test_a_store_of_few_tokens_makes_padded_batches(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 3)
    prepare(data_section(source="text", paths=[str(tmp_path)]), 256, tmp_path / "store")
    split = TokenStore.open(tmp_path / "store").split("train")
    with Loader(
        run_config(data={"tokenizer": "bytes", "seq_len": SEQ, "batch_tokens": 2 * SEQ}), split, 0, 1
    ) as loader:
        batch, _, state = next(loader)
    assert batch.target_count == 2 * 3  # the one window, in two epochs: "aaa" then its end
    assert state.samples == 2
