"""The learning rate at a position of the run: a pure function of steps or tokens."""

import math

from minka.plan.config import RunConfig


def learning_rate(config: RunConfig, step: int, tokens: int) -> float:
    """The rate for the step that begins after `step` steps and `tokens` tokens (in schedule.unit).

    Warm-up rises linearly and reaches the peak on its last step. cosine: Loshchilov & Hutter 2017; wsd, warm-up stable
    decay: Hu et al. 2024 (MiniCPM), here with a linear last part.
    """
    s, peak = config.schedule, config.optimizer.learning_rate
    # The position is the end of the step: the first step has a rate, and the last one reaches the final ratio.
    at = step + 1 if s.unit == "steps" else tokens + config.batch_tokens_at(tokens)
    if at <= s.warmup:
        return peak * at / s.warmup
    left = config.horizon - s.warmup
    done = min(1.0, (at - s.warmup) / left)
    if s.kind == "constant":
        return peak
    if s.kind == "wsd":
        decay = min(s.decay or max(1, config.horizon // 5), left)
        done = max(0.0, 1 - (config.horizon - min(at, config.horizon)) / decay)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if s.kind == "cosine" else 1 - done
    return peak * (s.final_ratio + (1 - s.final_ratio) * shape)
