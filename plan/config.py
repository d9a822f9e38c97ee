"""RunConfig: the whole configuration of a run in one frozen value, with the rules across its sections."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from minka.plan.config_sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GuardSection,
    KernelsSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TrackingSection,
)
from minka.plan.layout import Layout
from minka.plan.layout_rules import Asked, check_layout

FORMAT: Literal[1] = 1


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """A resolved run: every value, given or default. Derived numbers are computed from them."""

    format: Literal[1] = FORMAT
    run: RunSection
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    layout: Layout = Layout()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()
    kernels: KernelsSection = Field(default_factory=KernelsSection)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.data.tokenizer == "bytes" and self.model.vocab != 256:
            raise ValueError(f'data.tokenizer="bytes" has 256 entries; model.vocab is {self.model.vocab}')
        if self.data.seq_len > self.model.max_positions:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} is longer than model.max_positions={self.model.max_positions}"
            )
        if self.checkpoint.export and self.model.qkv_bias and self.model.qk_norm:
            raise ValueError(
                "model.qkv_bias with model.qk_norm: no Hugging Face model has both, so the run could not be exported; "
                "drop one of them, or set checkpoint.export=false"
            )
        if self.schedule.warmup >= self.horizon:
            raise ValueError(
                f"schedule.warmup={self.schedule.warmup} takes all of a run of {self.horizon} {self.schedule.unit}"
                f"; give {self.horizon - 1} or less, or make the run longer"
            )
        return self

    def check(self, ranks: int | None = None) -> Layout:
        """The layout, on `ranks` ranks where they are known. Raises UserError where it is not legal."""
        layout = self.layout if ranks is None else self.layout.resolve(ranks)
        check_layout(Asked(layout, self.model, self.data, self.kernels))
        return layout

    def batch_tokens_at(self, tokens: int) -> int:
        """Tokens in the global batch that begins after `tokens` consumed tokens (batch warm-up included)."""
        for stage in self.data.batch_warmup:
            if tokens < stage.until_tokens:
                return stage.batch_tokens
        return self.data.batch_tokens

    def finished(self, step: int, tokens: int) -> bool:
        """Whether a run that has begun `step` steps and consumed `tokens` tokens is over."""
        if self.run.max_steps is not None:
            return step >= self.run.max_steps
        assert self.run.max_tokens is not None  # RunSection: exactly one is set
        return tokens >= self.run.max_tokens

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; exact under batch warm-up, since the batch follows from tokens alone."""
        return self._end()[0]

    @property
    def total_tokens(self) -> int:
        """Tokens consumed by the whole run."""
        return self._end()[1]

    @property
    def horizon(self) -> int:
        """Length of the run in schedule.unit."""
        return self._end()[0 if self.schedule.unit == "steps" else 1]

    def _end(self) -> tuple[int, int]:
        step = tokens = 0
        for stage in self.data.batch_warmup:  # whole stages at once: a run may have millions of steps
            if tokens >= stage.until_tokens:
                continue
            steps = -(-(stage.until_tokens - tokens) // stage.batch_tokens)
            steps = min(steps, self._steps_left(step, tokens, stage.batch_tokens))
            step, tokens = step + steps, tokens + steps * stage.batch_tokens
        steps = self._steps_left(step, tokens, self.data.batch_tokens)
        return step + steps, tokens + steps * self.data.batch_tokens

    def _steps_left(self, step: int, tokens: int, batch_tokens: int) -> int:
        if self.run.max_steps is not None:
            return max(0, self.run.max_steps - step)
        assert self.run.max_tokens is not None
        return max(0, -(-(self.run.max_tokens - tokens) // batch_tokens))
