"""Which checkpoints are kept, and which may be deleted."""

from collections.abc import Sequence
from typing import NamedTuple

from minka.plan.config_sections import CheckpointSection


class Kept(NamedTuple):
    """A committed checkpoint."""

    step: int
    number: int  # of the save: after a return to an earlier step, a lower step can be the newer one
    permanent: bool = False


class WayBack(NamedTuple):
    """Where a run continues that was stopped because its steps were refused."""

    step: int | None  # of the checkpoint to go back to; None where there is none
    set_aside: int | None = None  # of the newest one, where its weights are the refused ones and an older one exists


def way_back(whole: Sequence[int], refused: int) -> WayBack:
    """`whole`: steps of the whole checkpoints, newest first. `refused`: the last accepted step before the refused ones.

    A checkpoint is proven once a later step was accepted: every one but the newest is.
    """
    if len(whole) > 1 and whole[0] == refused:
        return WayBack(whole[1], whole[0])
    return WayBack(whole[0] if whole else None)


def permanent(settings: CheckpointSection, step: int, tokens_before: int, tokens: int) -> bool:
    """Whether a checkpoint is kept forever. `tokens_before` had been consumed at the save before it."""
    every = settings.keep_every_steps
    return (every > 0 and step % every == 0) or milestone_passed(settings, tokens_before, tokens)


def milestone_passed(settings: CheckpointSection, tokens_before: int, tokens: int) -> bool:
    """Whether a number of checkpoint.keep_tokens is in (tokens_before, tokens]."""
    return any(tokens_before < milestone <= tokens for milestone in settings.keep_tokens)


def expendable(checkpoints: Sequence[Kept], newest: int) -> list[int]:
    """Return the steps that may be deleted, oldest first: neither permanent nor among the `newest` last saved."""
    by_age = sorted(checkpoints, key=lambda kept: (kept.number, kept.step))
    return [kept.step for kept in by_age[:-newest] if not kept.permanent]
