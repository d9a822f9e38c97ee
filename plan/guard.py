"""Decides about a step from its numbers. train/accept_step.py applies the decision."""

import math
from typing import Literal, NamedTuple

Action = Literal["accept", "skip", "stop"]


class Judgement(NamedTuple):
    """The verdict on one recorded step; `reason` is empty when it was accepted."""

    action: Action
    reason: str
    refused_in_a_row: int


def judge(loss: float, grad_norm: float, *, refused_in_a_row: int, max_refused: int) -> Judgement:
    """A step with a non-finite loss or gradient is refused; `max_refused` of them in a row stop the run."""
    broken = [name for name, value in (("loss", loss), ("gradient norm", grad_norm)) if not math.isfinite(value)]
    if not broken:
        return Judgement("accept", "", 0)
    reason = " and ".join(f"non-finite {name}" for name in broken)
    refused = refused_in_a_row + 1
    if refused >= max_refused:
        return Judgement("stop", f"{reason}, {refused} refused steps in a row (guard.max_refused_steps)", refused)
    return Judgement("skip", reason, refused)
