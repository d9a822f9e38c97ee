"""Generation: contexts, stopping, sampling. That it equals transformers' stands in test_hub.py."""

import pytest
import torch
from torch import Tensor

from minka.model.generate import generate

VOCAB = 32


def successor(tokens: Tensor, place: int) -> Tensor:
    """Logits of a model that surely says one more than the token it reads, whatever comes after it."""
    return torch.nn.functional.one_hot((tokens[0, place] + 1) % VOCAB, VOCAB) * 10.0


def test_it_stops_at_the_stop_token_or_at_the_limit() -> None:
    assert generate(successor, [3], 4, context=8, temperature=0, stop=None, seed=0) == [4, 5, 6, 7]
    assert generate(successor, [3], 9, context=8, temperature=0, stop=6, seed=0) == [4, 5, 6]
    assert generate(successor, [3], 0, context=8, temperature=0, stop=6, seed=0) == []


def test_inputs_hold_the_last_tokens_of_the_context_in_few_shapes() -> None:
    seen: list[list[int]] = []

    def watch(tokens: Tensor, place: int) -> Tensor:
        seen.append(tokens[0].tolist())
        return successor(tokens, place)

    generate(watch, list(range(10)), 30, context=24, temperature=0, stop=None, seed=0)
    assert {len(tokens) for tokens in seen} == {16, 24}
    assert seen[0] == [*range(10), 0, 0, 0, 0, 0, 0]
    assert seen[-1] == [(n + 15) % VOCAB for n in range(24)]


def test_a_sample_follows_from_its_seed_and_warmth_spreads_it() -> None:
    def flat(tokens: Tensor, place: int) -> Tensor:
        return successor(tokens, place) / 10

    def sample(temperature: float, seed: int) -> list[int]:
        return generate(flat, [1], 40, context=8, temperature=temperature, stop=None, seed=seed)

    assert sample(1.0, 5) == sample(1.0, 5) != sample(1.0, 6)
    assert sample(0.01, 5) == sample(0.0, 0) == [n % VOCAB for n in range(2, 42)]
    assert len(set(sample(1.0, 5))) > 15


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        generate(successor, [], 4, context=8, temperature=0, stop=None, seed=0)


def test_it_goes_on_with_the_token_that_was_agreed_on() -> None:
    def agree(token: int) -> int:
        return 20 if token == 5 else token

    found = generate(successor, [3], 9, context=8, temperature=0, stop=22, seed=0, agree=agree)
    assert found == [4, 20, 21, 22]
