"""Running time: seconds since the run began, without the pauses between its sessions."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from minka.plan.ledger import RETURNS
from minka.report.downsample import Numbers

BEFORE_START = RETURNS | {"fallback"}  # what a session may write before its `start`


class RunningTime:
    """Turns the time of an event into running seconds. A session begins with `start`, or the events right before it."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self._began = float(events[0]["time"]) if events else 0.0
        self._sessions: list[float] = []  # when each session but the first began
        self._paused: list[float] = []  # seconds of all pauses before it
        paused = 0.0
        for i, event in enumerate(events):
            if event["event"] != "start":
                continue
            first = i
            while first and events[first - 1]["event"] in BEFORE_START:
                first -= 1
            if first:
                paused += max(0.0, events[first]["time"] - events[first - 1]["time"])
                self._sessions.append(float(events[first]["time"]))
                self._paused.append(paused)

    def seconds(self, time: float) -> float:
        """Return the running seconds at `time`, which is the time of an event."""
        before = bisect_right(self._sessions, time)
        return max(0.0, time - self._began - (self._paused[before - 1] if before else 0.0))

    def of_steps(self, steps: Sequence[dict[str, Any]], took: Numbers) -> Numbers:
        """Return when each step ended. `steps` are `step` events, `took` their seconds.

        Steps are written some at a time, with the time of writing. A step ended no later than it was written, and no
        later than the next one began.
        """
        ends = np.array([self.seconds(step["time"]) for step in steps])
        total = np.cumsum(took)
        return np.maximum(total + np.minimum.accumulate((ends - total)[::-1])[::-1], 0.0)
