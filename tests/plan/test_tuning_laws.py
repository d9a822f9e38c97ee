"""Batch sizes and learning rates against the figures of their papers."""

import pytest

from minka.plan.tuning_laws import Band, Sizes, batch_band, beta2, rate_band, rounded_batch, weight_decay


def test_deepseeks_own_model() -> None:
    """7B on 2T tokens: it used batches of 2304 x 4096 tokens and a rate of 4.2e-4 (arXiv:2401.02954)."""
    sizes = Sizes(6.9e9, 6.5e9, 2e12)
    assert batch_band(sizes).laws["deepseek"] == pytest.approx(9.16e6, rel=2e-3)
    assert rate_band(sizes).laws["deepseek"] == pytest.approx(4.26e-4, rel=2e-3)


def test_porians_reference() -> None:
    """At 108M weights: 160 sequences of 2,048 tokens, rate 0.0047 (arXiv:2406.19146)."""
    sizes = Sizes(108e6, 80e6, 2e9)
    assert batch_band(sizes).laws["porian"] == pytest.approx(160 * 2048)
    assert rate_band(sizes).laws["porian"] == pytest.approx(0.0047)


def test_step_law() -> None:
    """1B without the vocabulary on 20B tokens: 0.44M tokens and 1.0e-3 (arXiv:2503.04715, evaluated)."""
    sizes = Sizes(1.1e9, 1e9, 20e9)
    assert batch_band(sizes).laws["step"] == pytest.approx(0.4419e6, rel=1e-3)
    assert rate_band(sizes).laws["step"] == pytest.approx(9.96e-4, rel=1e-3)


@pytest.mark.parametrize("band", [batch_band(Sizes(8e9, 7e9, 15e12)), rate_band(Sizes(8e9, 7e9, 15e12))])
def test_a_band_has_the_middle_of_three_laws_and_names_it(band: Band) -> None:
    assert [band.low, band.value, band.high] == sorted(band.laws.values())
    law = next(name for name, value in band.laws.items() if value == band.value)
    assert {"step": "Step", "deepseek": "DeepSeek", "porian": "Porian"}[law] in band.source


def test_weight_decay_gives_adamw_its_memory() -> None:
    """The memory's share of the run is batch / (rate x decay x tokens), best at 1.084 (D/N)^-0.527."""
    decay, source = weight_decay(Sizes(1e9, 1e9, 20e9), 442_000, 1e-3)
    assert 442_000 / (1e-3 * decay * 20e9) == pytest.approx(1.084 * 20**-0.527)
    assert "2505.13738" in source


def test_batches_are_few_twos_and_at_most_one_three() -> None:
    for tokens in (1.0, 1e4, 2.7e6, 9.1e6, 7e7):
        sequences = rounded_batch(tokens, 4096) // 4096
        while sequences % 2 == 0:
            sequences //= 2
        assert sequences in (1, 3)
        assert tokens < 4096 or rounded_batch(tokens, 4096) == pytest.approx(tokens, rel=0.3)
    assert (beta2(2**18)[0], beta2(2**19)[0]) == (0.99, 0.95)
