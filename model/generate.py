"""Text from a model, one token after the other; the whole context is computed again for each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST = 16  # tokens in the shortest input


def generate(
    next_logits: Callable[[Tensor, int], Tensor],
    prompt: Sequence[int],
    max_new: int,
    *,
    context: int,
    temperature: float,
    stop: int | None,
    seed: int,
    agree: Callable[[int], int] = lambda token: token,
) -> list[int]:
    """The tokens that follow `prompt`: at most `max_new`; `stop`, if met, is the last.

    next_logits: from tokens [1, T] int64 and a place in them to the logits [V] of what follows it. Ranks with equal
    arguments make the same calls. Inputs are padded on the right, which a causal model cannot see, to powers of two up
    to `context`, so that few shapes occur. temperature 0 takes the likeliest token; above 0, `seed` alone decides.
    `agree` replaces each token that was chosen here by the one that all ranks use: logits may differ in last bits.
    Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("a prompt needs at least one token")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new):
        seen = tokens[-context:]
        length = min(context, max(SMALLEST, 1 << (len(seen) - 1).bit_length()))
        padded = torch.tensor([seen + [0] * (length - len(seen))])
        logits_V = next_logits(padded, len(seen) - 1).float().cpu()
        if temperature == 0:
            chosen = logits_V.argmax()
        else:
            chosen = torch.multinomial(torch.softmax(logits_V / temperature, dim=0), 1, generator=generator)
        tokens.append(agree(int(chosen)))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]
