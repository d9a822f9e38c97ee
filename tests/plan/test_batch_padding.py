"""The share of padding sequences is reported before it is paid for."""

import pytest

from minka.plan.batch_padding import describe_padding, padding_share
from minka.plan.config import RunConfig
from minka.plan.load_config import load_run


def of_1024_sequences() -> RunConfig:
    return load_run("demo", ["data.batch_tokens=262144", "data.seq_len=256", "data.batch_warmup=[]"]).config


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "share"),
    [
        (1000, 1, 976 / 2000),  # 24 of the second round are there
        (1024, 1, 0),
        (512, 2, 0),
        (341, 3, 1022 / 2046),
        (1, 1000, 976 / 2000),
        (1, 3, 2 / 1026),
    ],
)
def test_padding_is_reported_from_one_percent(ranks: int, micro_batch: int, share: float) -> None:
    config = of_1024_sequences()
    layout = config.layout.model_copy(update={"shard": ranks, "micro_batch": micro_batch})
    assert padding_share(config, layout) == pytest.approx(share)
    assert bool(describe_padding(config, layout)) == (share >= 0.01)


def test_the_note_has_the_numbers_it_follows_from() -> None:
    config = of_1024_sequences()
    note = describe_padding(config, config.layout.model_copy(update={"shard": 1000, "micro_batch": 1}))
    numbers = ("49%", "1,024 sequences", "1,000 at a time", "1,000 data ranks", "micro_batch 1")
    assert all(number in note for number in numbers)
