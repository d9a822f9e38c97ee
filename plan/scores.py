"""Names of scores, and what must be said next to one."""

import math
from collections.abc import Mapping
from typing import Any

from minka.plan.ledger import number

BITS_PER_BYTE = "bits_per_byte"


def caveat(unaccounted: Mapping[str, float], score: str = BITS_PER_BYTE) -> str:
    """What to say next to a score per byte that does not charge for all bytes; empty when it does.

    unaccounted: by score, the share of the bytes that the tokenizer lost; NaN when it is not known.
    """
    share = unaccounted.get(score, 0.0)
    if not share:
        return ""
    lost = "text" if math.isnan(share) else f"{100 * share:.2g} % of the bytes"
    return f"not comparable: the tokenizer loses {lost}, which the score does not charge for"


def caveat_of(result: Mapping[str, Any]) -> str:
    """`caveat` for a recorded result, an `eval` event or a file in evals/, of any version and in any state."""
    lost = result.get("unaccounted")
    share = lost.get(BITS_PER_BYTE) if isinstance(lost, Mapping) else None
    return "" if share is None else caveat({BITS_PER_BYTE: number(share)})
