"""TextLoss: what a tokenizer does not give back of the text it was given. A score per byte cannot charge for it.

A vocabulary with gaps drops text, or makes one unknown token of all of it; a normalizer folds it (letter case, NFKC,
accents, white space).
"""

from collections import Counter
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from minka.data.tokenizer import TextTokenizer

BEFORE, SHOWN = 8, 32  # characters of the example before the first difference, and altogether


class TextLoss(BaseModel, frozen=True, extra="forbid"):
    """Sums over the documents that were decoded again: some of both splits, and all of the validation split."""

    tried: int = 0
    bytes: int = Field(0, description="UTF-8 bytes of their text")
    differ: int = Field(0, description="documents whose tokens decode to a different text")
    lost: int = Field(0, description="at least so many bytes do not come back")
    example: tuple[str, str] = Field(("", ""), description="a piece of the first such text, and what became of it")

    def after(self, tokenizer: TextTokenizer, tokens: NDArray[np.int64], text: str, size: int) -> tuple[Self, int]:
        """The sums with one more document of `size` bytes, and how many of its bytes are lost."""
        sums = {"tried": self.tried + 1, "bytes": self.bytes + size}
        decoded = tokenizer.decode(tokens)
        if decoded == text:
            return self.model_copy(update=sums), 0
        # Characters that are missing, whatever their order: a difference of long texts takes quadratic time.
        missing = Counter(text) - Counter(tokenizer.decode_known(tokens))
        lost = sum(count * len(character.encode()) for character, count in missing.items())
        sums |= {"differ": self.differ + 1, "lost": self.lost + lost}
        return self.model_copy(update=sums | ({} if self.differ else {"example": _example(text, decoded)})), lost

    def describe(self, tokenizer: str) -> str:
        """The message for people: how much differs, with the example."""
        old, new = self.example
        share = (
            f"at least {100 * self.lost / self.bytes:.2g} % of their bytes are lost" if self.lost else "none is lost"
        )
        return (
            f"tokenizer {tokenizer} changes text: {self.differ:,} of {self.tried:,} documents that were tried decode "
            f"to a different text, and {share}; {old!r} became {new!r}"
        )


def _example(text: str, decoded: str) -> tuple[str, str]:
    differs = (i for i, (old, new) in enumerate(zip(text, decoded, strict=False)) if old != new)
    at = max(0, next(differs, min(len(text), len(decoded))) - BEFORE)
    return text[at : at + SHOWN], decoded[at : at + SHOWN]
