"""Bits per byte against the definition written out on a real model, on one rank and on two."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minka.data.prepare import open_or_prepare
from minka.eval.bits_per_byte import REST, Scores, bits_per_byte, compressed_bits_per_byte, named_sources, ratio_of_sums
from minka.parallel.fsdp_engine import build_scorer
from minka.parallel.mesh import start_mesh
from minka.plan.config import RunConfig
from ranks import on_ranks
from tiny import tiny


def test_is_the_sum_of_the_models_losses_over_the_bytes(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    store = open_or_prepare(config, tmp_path)
    split = store.split("validation")
    nats = size = 0.0
    with start_mesh(config.layout) as mesh:
        scorer = build_scorer(config, mesh)
        for i in range(split.n_documents):
            tokens = torch.from_numpy(split.document(i).astype(np.int64))
            nats += math.log(256)  # the first token
            size += len(split.text_of(i).encode())
            for at in range(1, len(tokens)):  # each target by itself, in the first window that holds it
                first = max(0, -(-(at - 32) // 16) * 16)
                seen = tokens[None, first:at]
                logits = scorer.executor.parts[0](seen, None, torch.arange(seen.shape[1])[None])
                nats += float(torch.nn.functional.cross_entropy(logits[0, -1], tokens[at]).detach())
        scores = bits_per_byte(scorer, split, config, mesh, store.eod, lambda: None)
        vars(split)["lost_bytes"] = np.full(split.n_documents, np.nan)  # a lossy store that nobody measured
        unknown = bits_per_byte(scorer, split, config, mesh, store.eod, lambda: None).unaccounted
    assert scores.scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert scores.scores["bits_per_byte/text"] == scores.scores["bits_per_byte"]
    assert scores.bytes == size
    assert scores.unaccounted == {}
    assert unknown.keys() == scores.scores.keys()
    assert all(map(math.isnan, unknown.values()))


def test_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = tiny(tmp_path, eval={"batch_sequences": 2})
    open_or_prepare(config, tmp_path)
    (alone,) = on_ranks(score, 1, config, str(tmp_path))
    for together in on_ranks(score, 3, config, str(tmp_path)):
        assert together.scores == pytest.approx(alone.scores, rel=1e-6)
        assert together.stderr == pytest.approx(alone.stderr, rel=1e-5)


def test_standard_error_is_that_of_repeated_draws() -> None:
    dice = np.random.default_rng(0)
    sizes = dice.integers(100, 2000, 200).astype(float)
    bits = sizes * 2 + dice.normal(0, 300, 200)
    draws = []
    for _ in range(2000):
        chosen = dice.integers(0, 200, 200)
        draws.append(bits[chosen].sum() / sizes[chosen].sum())
    assert ratio_of_sums(bits, sizes)[1] == pytest.approx(np.std(draws), rel=0.1)


def test_many_sources_share_one_score_but_the_largest() -> None:
    """A corpus whose source is a URL: every document has a source of its own."""
    sizes = np.arange(8000.0)
    names = named_sources([f"https://x.test/{i}" for i in range(8000)], sizes)
    kept = {f"https://x.test/{i}" for i in range(8000 - 49, 8000)}
    assert set(names) == kept | {REST}
    assert (names == REST).sum() == 8000 - 49
    few = [str(i % 50) for i in range(200)]
    assert named_sources(few, np.ones(200)).tolist() == few
    taken = named_sources([REST] * 9 + [str(i) for i in range(50)], np.ones(59))  # a source that has its name
    assert (taken == REST).sum() == 10
    assert len(set(taken)) == 50


def test_compressors_are_counted_in_bits_of_each_plain_byte() -> None:
    found = compressed_bits_per_byte([b"a" * 1000, bytes(range(256))])
    assert set(found) == {"zlib -9, each document", "xz -9, all in one"}
    assert found["zlib -9, each document"] == pytest.approx(8 * (17 + 267) / 1256, rel=0.02)


def score(config: RunConfig, root: str) -> Scores:
    with start_mesh(config.layout) as mesh:
        store = open_or_prepare(config, Path(root))
        scorer = build_scorer(config, mesh)
        return bits_per_byte(scorer, store.split("validation"), config, mesh, store.eod, lambda: None)
