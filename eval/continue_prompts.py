"""Text that a model writes after given prompts. It shows what scores do not."""

import hashlib

from tokenizers import Tokenizer

from minka.model.generate import generate
from minka.parallel.engine import Scorer
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig


def continue_prompts(
    scorer: Scorer, tokenizer: Tokenizer, config: RunConfig, step: int, mesh: Mesh, eod: int
) -> list[tuple[str, str]]:
    """Return (prompt, continuation) for each of eval.prompts. Collective: every rank uses the tokens of rank 0.

    `step`: of the weights. The random numbers of each sample are its own, and the same whenever it is made again.
    """
    found = []
    for index, prompt in enumerate(config.eval.prompts):
        given = tokenizer.encode(prompt, add_special_tokens=False).ids or [eod]
        new = generate(
            scorer.next_logits,
            given,
            config.eval.sample_tokens,
            context=config.data.seq_len,
            temperature=config.eval.temperature,
            stop=eod,
            seed=sample_seed(config.run.seed, step, index, prompt),
            agree=lambda token: mesh.sum_on_host([token if mesh.is_first else 0])[0],
        )
        # Decoded after the prompt: at the beginning of a text some decoders remove a space.
        before, whole, alone = (
            str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (given, [*given, *new], list(new))
        )
        found.append((prompt, whole[len(before) :] if whole.startswith(before) else alone))
    return found


def sample_seed(seed: int, step: int, index: int, prompt: str) -> int:
    """A seed below 2**63 for one sample. With one for all, every step and prompt would draw the same numbers."""
    digest = hashlib.sha256(f"{seed} {step} {index} {prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
