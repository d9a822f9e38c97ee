"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere. Other ranks show nothing."""

import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from minka.plan.cli import print_table
from minka.plan.config import RunConfig
from minka.train.metrics import StepRecord


class Console:
    """Prints for the run where `speaks` is set. `as_json` leaves stdout to the one JSON document at the end."""

    def __init__(self, config: RunConfig, *, speaks: bool, as_json: bool) -> None:
        self.speaks, self._total = speaks, config.total_steps
        self.out: TextIO = sys.stderr if as_json else sys.stdout
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print lines that stay, above the bar when there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.speaks:
            print(text, file=self.out, flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print a table, once the bar has ended."""
        print_table(rows, file=self.out)

    def start(self, step: int) -> None:
        """Show the bar on a terminal, with `step` steps done."""
        if not (self.speaks and self.out.isatty()):
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=RichConsole(file=self.out))
        self._bar.start()
        self._bar.add_task("", total=self._total, completed=step)

    def step(self, record: StepRecord, tokens_per_second: float, mfu: float | None, left: float | None) -> None:
        """Show the newest logged step. `left`: seconds until the end of the run, where they are known."""
        text = f"loss {record.loss:.4f}  norm {record.grad_norm:.3f}  lr {record.learning_rate:.2e}"
        text += f"  {tokens_per_second:,.0f} tokens/s" + (f"  MFU {100 * mfu:.1f} %" if mfu is not None else "")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.step, description=text)
        else:
            text += f"  {rounded_up(left)} left" if left else ""
            self.say(f"step {record.step:>{len(str(self._total))}}/{self._total}  {text}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def rounded_up(seconds: float) -> str:
    """h:mm, below a minute seconds; rounded up: a run that is not over has a second left."""
    if math.ceil(seconds) < 60:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours:,}:{minutes:02}"
