"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere, nothing on other ranks."""

import sys
from typing import Any, TextIO

from minka.plan.config import RunConfig
from minka.train.metrics import StepRecord


class Console:
    """Speaks for the run. With `as_json` stdout is left to the one JSON document at the end."""

    def __init__(self, config: RunConfig, *, speaks: bool, as_json: bool) -> None:
        self.config, self.speaks = config, speaks
        self.out: TextIO = sys.stderr if as_json else sys.stdout
        self._total = config.total_steps
        self._bar: Any = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line (or table) that stays."""
        if not self.speaks:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
            return
        try:
            print(text, file=self.out, flush=True)
        except BrokenPipeError:  # who listened has gone (`| head`); a run goes on without
            self.speaks = False

    def begin(self, step: int) -> None:
        """Training starts at `step`."""
        if not (self.speaks and self.out.isatty()):
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=RichConsole(file=self.out))
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, completed=step)

    def step(self, record: StepRecord, tokens_per_second: float, mfu: float | None) -> None:
        """The newest logged step."""
        text = f"loss {record.loss:.4f}  norm {record.grad_norm:.3f}  lr {record.learning_rate:.2e}"
        text += f"  {tokens_per_second:,.0f} tokens/s" + (f"  MFU {100 * mfu:.1f} %" if mfu is not None else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=text)
        else:
            self.say(f"step {record.step:>{len(str(self._total))}}/{self._total}  {text}")

    def end(self) -> None:
        """Training is over; the bar goes."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
