"""Every token of every document but its first is scored exactly once, and sees only its own document."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minka.eval.scoring_windows import pack_windows, padding_batch, scoring_windows

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@given(lengths=lengths, seq_len=st.integers(2, 20), stride=st.integers(1, 20), batch=st.integers(1, 4))
def test_each_target_is_scored_once(lengths: list[int], seq_len: int, stride: int, batch: int) -> None:
    stride = min(stride, seq_len)
    documents = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    scored: dict[int, list[int]] = {i: [] for i in range(len(documents))}
    cut = (w for i, d in enumerate(documents) for w in scoring_windows(i, d, seq_len, stride))
    for batch_of_rows in pack_windows(cut, seq_len, batch, padding=9):
        assert batch_of_rows.tokens.shape == (batch, seq_len)
        owned = batch_of_rows.owners >= 0
        assert torch.equal(owned, batch_of_rows.targets >= 0)
        for owner, target, token in zip(
            batch_of_rows.owners[owned], batch_of_rows.targets[owned], batch_of_rows.tokens[owned], strict=True
        ):
            assert target == token + 1  # the next token of the same document
            scored[int(owner)].append(int(target))
    for i, document in enumerate(documents):
        assert sorted(scored[i]) == list(document[1:])


def test_overlap_gives_context_and_positions_restart() -> None:
    cut = list(scoring_windows(0, np.arange(30), length=8, stride=4))
    assert [w.scored for w in cut] == [0, 4, 4, 4, 4, 4, 4]
    (batch,) = pack_windows(cut[:1], 16, 1, padding=0)
    assert batch.positions[0].tolist() == [*range(8), *range(8)]  # the rest is a document of its own
    assert batch.documents[0].tolist() == [1] * 8 + [0] * 8


def test_a_padding_batch_scores_nothing() -> None:
    padding = padding_batch(8, 2, 5)
    assert (padding.targets == -100).all()
    assert (padding.owners == -1).all()


@pytest.mark.parametrize("stride", [8, 4])
def test_short_documents_share_a_row(stride: int) -> None:
    cut = [w for i in range(3) for w in scoring_windows(i, np.arange(3), 8, stride)]
    (batch,) = pack_windows(cut, 8, 1, padding=0)
    assert batch.owners[0].tolist() == [0, 0, 1, 1, 2, 2, -1, -1]
