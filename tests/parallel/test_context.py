"""Context shards: which rank has which tokens, and the segments that variable-length kernels are given."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minka.model.attention import allowed_pairs
from minka.parallel.context import gathered_places, places, varlen_segments
from models import packed


@pytest.mark.parametrize("ways", [2, 3, 4])
def test_every_token_is_in_one_part_and_causal_work_is_even(ways: int) -> None:
    length = 24 * ways
    parts = [places(length, ways, rank) for rank in range(ways)]
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    assert torch.equal(torch.cat(parts), gathered_places(length, ways))
    assert len({int((part + 1).sum()) for part in parts}) == 1  # a query's work is its place


@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_segments_give_the_attention_of_whole_rows(ways: int, seed: int) -> None:
    rows, length, heads, width = 3, 32, 2, 8
    _, documents, _, _ = packed(rows, length, 256, seed=seed)
    q, k, v = torch.randn(3, rows, heads, length, width, dtype=torch.float64)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_pairs(documents)[:, None])
    order = gathered_places(length, ways)
    for rank in range(ways):
        mine = places(length, ways, rank)
        starts, key_starts, take, longest = varlen_segments(documents, ways, rank)
        flat = [x.movedim(1, 2).flatten(0, 1) for x in (q[:, :, mine], k[:, :, order], v[:, :, order])]
        found = segments(flat[0], flat[1][take], flat[2][take], starts, key_starts)
        expected = whole[:, :, mine].movedim(1, 2).flatten(0, 1)
        assert (found - expected).norm() <= 1e-12 * expected.norm()
        assert longest == int(key_starts.diff().max())
        assert starts[-1] == rows * length // ways


def segments(q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, starts: Tensor, key_starts: Tensor) -> Tensor:
    """What a variable-length kernel computes: causal in each segment, the last query aligned with the last key."""
    found = []
    for q0, q1, k0, k1 in zip(starts[:-1], starts[1:], key_starts[:-1], key_starts[1:], strict=True):
        q, k, v = q_NHC[q0:q1].movedim(1, 0), k_MHC[k0:k1].movedim(1, 0), v_MHC[k0:k1].movedim(1, 0)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).movedim(0, 1))
    return torch.cat(found)
