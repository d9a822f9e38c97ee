"""What is due at a step: pure functions of configuration and position, the same on every rank."""

from minka.plan.config import RunConfig
from minka.plan.retention import milestone_passed
from minka.plan.run_state import RunState
from minka.train.state import State


def checkpoint_due(config: RunConfig, before: State, after: State) -> bool:
    """Every checkpoint.every_steps steps, and when a number of checkpoint.keep_tokens has been consumed."""
    settings = config.checkpoint
    return _every(settings.every_steps, after.step) or milestone_passed(settings, before.tokens, after.tokens)


def detail_due(config: RunConfig, step: int) -> bool:
    """Every tracking.detail_every steps, and on the first when there are any."""
    return _every(config.tracking.detail_every, step) or (config.tracking.detail_every > 0 and step == 1)


def eval_due(config: RunConfig, before: State, after: State) -> bool:
    """Every eval.every_steps steps, and whenever eval.every_tokens more tokens have been consumed."""
    tokens = config.eval.every_tokens
    return _every(config.eval.every_steps, after.step) or (
        tokens > 0 and after.tokens // tokens > before.tokens // tokens
    )


def evaluation_missed(config: RunConfig, before: RunState, state: State) -> bool:
    """Whether the run was ended between the save of `state`, from which it resumes, and the evaluation due there."""
    if before.position is None or before.position.step != state.step or before.evaluated:
        return False  # older checkpoints were evaluated before the run trained on
    return eval_due(config, State(tokens=before.tokens_before), state)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
