"""RunConfig: the whole configuration of a run in one frozen value, with the rules across its sections."""

from typing import Literal, Self

from pydantic import BaseModel, model_validator

from minka.plan.config_sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GuardSection,
    KernelsSection,
    ModelSection,
    OptimizerSection,
    PlanSection,
    RunSection,
    ScheduleSection,
    TrackingSection,
)
from minka.plan.errors import UserError
from minka.plan.hub_family import family_of
from minka.plan.layout import Layout
from minka.plan.layout_rules import Asked, check_layout


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """A resolved run: every value, given or default. Derived numbers are computed from them."""

    format: Literal[1] = 1
    run: RunSection
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    layout: Layout = Layout()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    plan: PlanSection = PlanSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()
    kernels: KernelsSection = KernelsSection()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.data.tokenizer == "bytes" and self.model.vocab != 256:
            raise ValueError(f'data.tokenizer="bytes" has 256 entries; model.vocab is {self.model.vocab}')
        if self.data.seq_len > self.model.max_positions:
            longest = f"model.max_positions={self.model.max_positions}"
            raise ValueError(f"data.seq_len={self.data.seq_len} is longer than {longest}")
        if self.checkpoint.export:
            try:
                family_of(self.model)
            except UserError as error:
                raise ValueError(
                    f"the run could not be exported: {error.what}; {error.remedy}, or set checkpoint.export=false"
                ) from None
        if self.schedule.warmup >= self.horizon:
            raise ValueError(
                f"schedule.warmup={self.schedule.warmup} takes all of a run of {self.horizon} {self.schedule.unit}"
                f"; give {self.horizon - 1} or less, or make the run longer"
            )
        return self

    def check(self, ranks: int | None = None) -> Layout:
        """The layout, on `ranks` ranks where they are known. Raises UserError where it is not legal."""
        layout = self.layout if ranks is None else self.layout.resolve(ranks)
        check_layout(Asked(layout, self.model, self.data, self.kernels, self.optimizer))
        return layout

    def after_warmup(self) -> Self:
        """The run without its batch warm-up."""
        return self.model_copy(update={"data": self.data.model_copy(update={"batch_warmup": ()})})

    def warmup_refused(self, ranks: int) -> str:
        """Why a layout that is legal for the last size of batch is not legal for an earlier one; else empty."""
        try:
            self.check(ranks)
        except UserError as refused:
            return str(refused)
        return ""

    def batch_tokens_at(self, tokens: int) -> int:
        """Tokens in the global batch that begins after `tokens` consumed tokens (batch warm-up included)."""
        stages = (stage.batch_tokens for stage in self.data.batch_warmup if tokens < stage.until_tokens)
        return next(stages, self.data.batch_tokens)

    def finished(self, step: int, tokens: int) -> bool:
        """Whether a run that has begun `step` steps and consumed `tokens` tokens is over."""
        if self.run.max_tokens is not None:
            return tokens >= self.run.max_tokens
        return self.run.max_steps is not None and step >= self.run.max_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, batch warm-up included."""
        return self.end()[0]

    @property
    def total_tokens(self) -> int:
        """Tokens consumed by the whole run."""
        return self.end()[1]

    @property
    def horizon(self) -> int:
        """Length of the run in schedule.unit."""
        return self.end()[0 if self.schedule.unit == "steps" else 1]

    def end(self, step: int = 0, tokens: int = 0) -> tuple[int, int]:
        """Steps and tokens at the end of a run that is at `step` and `tokens`: other settings may have led there.

        Counted by whole stages of the batch: a run may have millions of steps.
        """
        stages = [(stage.until_tokens, stage.batch_tokens) for stage in self.data.batch_warmup]
        for until, batch_tokens in (*stages, (None, self.data.batch_tokens)):
            ends = [end for end in (until, self.run.max_tokens) if end is not None]
            lefts = [-(-(end - tokens) // batch_tokens) for end in ends]
            if self.run.max_steps is not None:
                lefts.append(self.run.max_steps - step)
            steps = max(0, min(lefts))
            step, tokens = step + steps, tokens + steps * batch_tokens
        return step, tokens
