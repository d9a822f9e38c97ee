"""Running time: seconds since the run began, with the pauses between its sessions left out."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from minka.report.downsample import Numbers

COMING_BACK = frozenset({"fallback", "restore", "restart", "start"})  # what a session may begin with


class Clock:
    """Turns an event's time into running seconds. A session begins with `start`, or what stands right before it."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self._from = float(events[0]["time"]) if events else 0.0
        self._begins: list[float] = []
        self._paused: list[float] = []
        paused = 0.0
        for i, event in enumerate(events):
            if event["event"] != "start":
                continue
            first = i
            while first and events[first - 1]["event"] in COMING_BACK - {"start"}:
                first -= 1
            if first:
                paused += max(0.0, events[first]["time"] - events[first - 1]["time"])
                self._begins.append(float(events[first]["time"]))
                self._paused.append(paused)

    def seconds(self, time: float) -> float:
        """Running seconds at `time`, which is an event's."""
        before = bisect_right(self._begins, time)
        return max(0.0, time - self._from - (self._paused[before - 1] if before else 0.0))

    def of_steps(self, steps: Sequence[dict[str, Any]], took: Numbers) -> Numbers:
        """When each step ended: `steps` are `step` events, `took` their seconds.

        Steps are written some at a time, with the time of writing. A step ended no later than it was written, and no
        later than the next one began.
        """
        ends = np.array([self.seconds(step["time"]) for step in steps])
        for i in range(len(ends) - 2, -1, -1):
            ends[i] = min(ends[i], ends[i + 1] - took[i + 1])
        return np.maximum(ends, 0.0)
