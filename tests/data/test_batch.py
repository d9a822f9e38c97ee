"""Batches: which targets count, where documents and positions restart, what padding is."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minka.benchmarks.data_path import synthetic_stream
from minka.data.batch import IGNORED, PADDING, build_batch
from minka.data.sample_order import window_count

EOD = 9


def stream_of(lengths: list[int]) -> NDArray[np.uint16]:
    """Documents of tokens 1..8 in turn, each closed by EOD (its length counts it)."""
    tokens: list[int] = []
    for length in lengths:
        tokens += [1 + (len(tokens) + i) % 8 for i in range(length - 1)] + [EOD]
    return np.array(tokens, dtype=np.uint16)


def one_by_one(stream: NDArray[Any], window: int, seq_len: int) -> tuple[list[int], ...]:
    """The same rules, token by token: (tokens, targets, documents, positions)."""
    rows: tuple[list[int], ...] = ([], [], [], [])
    document = position = 0
    for at in range(window * seq_len, (window + 1) * seq_len):
        real = window != PADDING and at < len(stream)
        token = int(stream[at]) if real else EOD
        counts = real and token != EOD
        rows[0].append(token)
        rows[1].append(int(stream[at + 1]) if counts else IGNORED)
        rows[2].append(document)
        rows[3].append(position)
        ends = real and token == EOD
        document, position = (document + 1, 0) if ends else (document, position + 1)
    return rows


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 24),
    padding=st.integers(0, 2),
)
def test_a_batch_is_what_the_rules_say_token_by_token(lengths: list[int], seq_len: int, padding: int) -> None:
    stream = stream_of(lengths)
    windows = [*range(window_count(len(stream), seq_len)), *[PADDING] * padding]
    batch = build_batch(stream, windows, np.array(windows), seq_len, EOD)
    for row, window in enumerate(windows):
        made = (batch.tokens, batch.targets, batch.documents, batch.positions)
        assert tuple(tensor[row].tolist() for tensor in made) == one_by_one(stream, window, seq_len)
    assert batch.target_count == int((batch.targets != IGNORED).sum())
    assert batch.samples.tolist() == windows


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), seq_len=st.integers(2, 24))
def test_every_target_of_the_stream_counts_once_and_none_crosses_documents(lengths: list[int], seq_len: int) -> None:
    stream = stream_of(lengths)
    windows = np.arange(window_count(len(stream), seq_len))
    batch = build_batch(stream, windows, windows, seq_len, EOD)
    # Every token but the first of each document is a target, the closing EOD among them.
    assert batch.target_count == len(stream) - len(lengths)
    assert bool(((batch.targets != IGNORED).sum(dim=1) > 0).all())  # no sample is empty
    counted = batch.targets[batch.targets != IGNORED]
    assert int((counted == EOD).sum()) == len(lengths)


def test_padding_sequences_have_no_target_one_document_and_running_positions() -> None:
    batch = build_batch(stream_of([5, 5]), [PADDING], np.array([PADDING]), 6, EOD)
    assert batch.target_count == 0
    assert batch.targets.tolist() == [[IGNORED] * 6]
    assert batch.documents.tolist() == [[0] * 6]
    assert batch.positions.tolist() == [list(range(6))]
    assert batch.samples.tolist() == [-1]


def test_all_tensors_are_int64() -> None:
    batch = build_batch(stream_of([5, 5]), [0], np.array([0]), 6, EOD)
    made = (batch.tokens, batch.targets, batch.documents, batch.positions, batch.samples)
    assert {tensor.dtype for tensor in made} == {torch.int64}


def test_micro_batches_are_the_batch_cut_in_order() -> None:
    stream = stream_of([7] * 20)
    batch = build_batch(stream, range(6), np.arange(6), 10, EOD)
    pieces = batch.micro_batches(2)
    assert len(pieces) == 3
    for name in ("tokens", "targets", "documents", "positions", "samples"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert [piece.target_count for piece in pieces] == [int((p.targets != IGNORED).sum()) for p in pieces]
    assert sum(piece.target_count for piece in pieces) == batch.target_count
    with pytest.raises(ValueError, match="6 sequences cannot be cut"):
        batch.micro_batches(4)


def test_building_a_batch_costs_at_most_a_few_copies_of_it() -> None:
    """CPU time of 2,048-token samples, in copies of the tensors they become: about 3, and far more token by token."""
    stream, windows = synthetic_stream(mean_length=1_000, tokens=4_000_000), np.arange(32)
    source = torch.zeros(4, 32, 2048, dtype=torch.int64)

    def seconds(work: Callable[[], object]) -> float:
        began = time.process_time()
        for _ in range(50):
            work()
        return time.process_time() - began

    ours, copying = (
        min(seconds(work) for _ in range(3))
        for work in (lambda: build_batch(stream, windows, windows, 2048, EOD), source.clone)
    )
    assert ours < 30 * copying
