"""The learning rate at each position, against the formulas written out, in steps and in tokens."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from minka.train.schedule import learning_rate
from tiny import tiny


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warms_up_to_the_peak_and_ends_at_the_final_ratio(kind: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, schedule={"kind": kind, "warmup": 4, "final_ratio": 0.1})
    rates = [learning_rate(config, step, 0) for step in range(20)]
    peak = config.optimizer.learning_rate
    assert rates[:4] == pytest.approx([peak * n / 4 for n in (1, 2, 3, 4)])
    assert rates[-1] == pytest.approx(peak * (1.0 if kind == "constant" else 0.1))
    assert all(a >= b for a, b in pairwise(rates[3:]))


def test_cosine_is_the_cosine(tmp_path: Path) -> None:
    config = tiny(tmp_path, schedule={"kind": "cosine", "warmup": 4, "final_ratio": 0.1})
    for step in range(4, 20):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1 - 4) / 16))
        assert learning_rate(config, step, 0) == pytest.approx(3e-3 * expected)


def test_wsd_is_flat_until_its_last_part(tmp_path: Path) -> None:
    config = tiny(tmp_path, schedule={"kind": "wsd", "warmup": 2, "decay": 5, "final_ratio": 0.0})
    rates = [learning_rate(config, step, 0) / 3e-3 for step in range(20)]
    assert rates[1:15] == pytest.approx([1.0] * 14)
    assert rates[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_in_tokens_the_same_tokens_have_the_same_rate_whatever_the_batches(tmp_path: Path) -> None:
    run, schedule = {"max_steps": None, "max_tokens": 64 * 32 * 10}, {"unit": "tokens", "warmup": 640}
    small = tiny(tmp_path, run=run, schedule=schedule, data={"batch_tokens": 64, "batch_warmup": []})
    large = tiny(tmp_path, run=run, schedule=schedule, data={"batch_tokens": 128, "batch_warmup": []})
    # Both steps end at 1,280 tokens.
    assert learning_rate(small, 19, 1280 - 64) == learning_rate(large, 9, 1280 - 128)
