"""`--profile 10:13`: trace these steps into one file per rank in the run's logs (chrome://tracing, Perfetto)."""

import sys
from pathlib import Path
from typing import Any

import torch

from minka.plan.read_file import first_line


class Profile:
    """Traces steps first < step <= last, counted as in the ledger. An empty window traces nothing."""

    def __init__(self, window: tuple[int, int], file: Path) -> None:
        self.first, self.last = window
        self.file = file
        self._profiler: Any = None
        self._marked: Any = None  # the step under way, as a span in the trace
        self.step(0)

    def step(self, step: int) -> None:
        """Start or end the trace after `step` has ended."""
        if self.first < self.last and step == self.first:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        elif step >= self.last:
            self.close()
        self._mark(step + 1)

    def _mark(self, step: int | None) -> None:
        """End the span of the step that has ended, and begin that of `step`."""
        if self._marked is not None:
            self._marked.__exit__(None, None, None)
        self._marked = None
        if self._profiler is not None and step is not None:
            self._marked = torch.profiler.record_function(f"step {step}")
            self._marked.__enter__()

    def close(self) -> None:
        """End a running trace and write it."""
        self._mark(None)
        if self._profiler is not None:
            self._profiler.stop()
            said = str(self.file)
            try:
                self._profiler.export_chrome_trace(said)
            except Exception as error:  # torch raises RuntimeError, too
                said = f"it could not be written: {first_line(error)}"
            print(f"trace of steps {self.first + 1} to {self.last}: {said}", file=sys.stderr, flush=True)
            self._profiler = None
