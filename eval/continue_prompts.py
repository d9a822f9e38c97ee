"""Text that a model writes after given prompts. It shows what scores do not."""

from pathlib import Path

from tokenizers import Tokenizer

from minka.model.generate import generate
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


def continue_prompts(
    scorer: Scorer, tokenizer_file: Path, config: RunConfig, mesh: Mesh, eod: int
) -> list[tuple[str, str]]:
    """Return (prompt, continuation) for each of eval.prompts. Collective: every rank uses the tokens of rank 0."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found = []
    for prompt in config.eval.prompts:
        new = generate(
            scorer.next_logits,
            tokenizer.encode(prompt, add_special_tokens=False).ids or [eod],
            config.eval.sample_tokens,
            context=config.data.seq_len,
            temperature=config.eval.temperature,
            stop=eod,
            seed=config.run.seed,
            agree=lambda token: mesh.sum_on_host([token if mesh.is_first else 0])[0],
        )
        found.append((prompt, str(tokenizer.decode(list(new), skip_special_tokens=True))))
    return found
