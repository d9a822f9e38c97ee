"""Where the running time went: computing, data, saves, evaluations, repeated steps, starting and waiting."""

import numpy as np

from minka.report.curves import PARTS, StepColumns, part_seconds
from minka.report.downsample import Numbers
from minka.report.run_files import RunFiles
from minka.report.running_time import RunningTime


def time_split(run: RunFiles, steps: StepColumns, time: RunningTime) -> dict[str, float]:
    """Return running seconds by part. `repeated`: steps that count no more; `starting, waiting`: the rest."""
    ends = [event for event in run.events if event["event"] == "stop"]
    counted = {part: _sum(steps.of[part]) for part in PARTS}
    split = {part: counted[part] + _sum(part_seconds(ends, part)) for part in PARTS}
    done = [event for event in run.events if event["event"] == "step"]
    if len(done) > len(steps.step):
        split["repeated"] = sum(_sum(part_seconds(done, part)) - counted[part] for part in PARTS)
    total = time.seconds(run.events[-1]["time"]) if run.events else 0.0
    split["starting, waiting"] = total - sum(split.values())
    return {name: round(max(0.0, seconds), 3) for name, seconds in split.items()}


def _sum(values: Numbers) -> float:
    return float(np.nansum(values))
