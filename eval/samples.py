"""Text that a model writes after given prompts: what numbers do not show."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from minka.model.generate import generate
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


def samples(scorer: Scorer, tokenizer_file: Path, config: RunConfig, mesh: Mesh, eod: int) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of eval.prompts. Collective: every rank walks the tokens that rank 0 chose."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found = []
    for prompt in config.eval.prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eod]
        new = generate(
            scorer.next_logits,
            ids,
            config.eval.sample_tokens,
            context=config.data.seq_len,
            temperature=config.eval.temperature,
            stop=eod,
            seed=config.run.seed,
            agree=lambda token: mesh.sum_on_host([token if mesh.is_first else 0])[0],
        )
        found.append((prompt, decode(tokenizer, new)))
    return found


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Text of `tokens`, special ones left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
