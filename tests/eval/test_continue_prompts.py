"""Continuing prompts is collective: ranks whose logits differ use the same tokens and make the same calls.

A continuation has the space that follows the prompt.
"""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from minka.eval.continue_prompts import continue_prompts
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh, start_mesh
from minka.plan.config import RunConfig
from minka.plan.layout import Layout
from ranks import on_ranks
from tiny import tiny

WORDS = {f"w{number}": number for number in range(8)}
EOD = 7


def test_ranks_that_would_choose_differently_use_the_tokens_of_rank_0(tmp_path: Path) -> None:
    config = tiny(tmp_path, eval={"prompts": ["w1", "w2 w3"], "sample_tokens": 6})
    found = on_ranks(sampled, 3, config, str(tmp_path / "tokenizer.json"))
    assert found[0] == found[1] == found[2]
    assert [text for _, text in found[0]] == [" w2 w3 w4 w5 w6 w7", " w4 w5 w6 w7"]


class Disagreeing:
    """Rank 0 predicts one more than the token it reads; the other ranks would end at once. Every call is collective."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        self.mesh.barrier()
        said = tokens[0, place] + 1 if self.mesh.is_first else torch.tensor(EOD)
        return torch.nn.functional.one_hot(said.clamp(max=EOD), len(WORDS)).float()


def sampled(config: RunConfig, file: str) -> Any:
    with start_mesh(Layout()) as mesh:
        if mesh.is_first:
            save_tokenizer(file)
        mesh.barrier()
        tokenizer = Tokenizer.from_file(file)
        return continue_prompts(cast(Scorer, Disagreeing(mesh)), tokenizer, config, 1, mesh, EOD)


def save_tokenizer(file: str) -> None:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(file)


class Undecided:
    """Every token is as likely as any other, but the end: only the random numbers decide."""

    def next_logits(self, tokens: Tensor, place: int) -> Tensor:
        return torch.tensor([0.0] * EOD + [-100.0])


@pytest.mark.parametrize(("temperature", "different"), [(1.0, 6), (0.0, 1)])
def test_every_sample_draws_numbers_of_its_own_and_the_same_ones_again(
    temperature: float, different: int, tmp_path: Path
) -> None:
    """Greedy ones draw none."""
    save_tokenizer(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompts = {"prompts": ["w1", "w1", "w2"], "sample_tokens": 20, "temperature": temperature}
    config = tiny(tmp_path, eval=prompts)

    def texts(step: int) -> list[str]:
        with start_mesh(Layout()) as mesh:
            scorer = cast(Scorer, Undecided())
            return [text for _, text in continue_prompts(scorer, tokenizer, config, step, mesh, EOD)]

    assert len({*texts(1), *texts(2)}) == different
    assert texts(2) == texts(2)
