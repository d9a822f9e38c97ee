"""The scores and samples of a run's evaluations, from its ledger and from evals/."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minka.plan.ledger import is_count, number
from minka.report.curves import StepColumns
from minka.report.downsample import rounded
from minka.report.run_files import Event, RunFiles
from minka.report.running_time import RunningTime

POINT = ("step", "tokens", "seconds", "value", "stderr")


def eval_scores(run: RunFiles, steps: StepColumns, time: RunningTime) -> list[Event]:
    """Return evaluations by suite and step: those of the ledger, and those made later of checkpoints (evals/)."""
    found: dict[tuple[str, int], Event] = {}
    for event in run.kept:
        if event["event"] == "eval" and isinstance(event.get("scores"), dict):
            suite = str(event.get("suite", ""))
            found[suite, event["step"]] = _evaluation(event, suite, time.seconds(event["time"]))
    end = max([*steps.step.tolist(), *(step for _, step in found)], default=math.inf)
    for result in run.evals:
        if result["step"] <= end:  # later ones are of steps that count no more
            seconds = float(np.interp(result["step"], steps.step, steps.seconds)) if len(steps.step) else 0.0
            found.setdefault((result["suite"], result["step"]), _evaluation(result, result["suite"], seconds))
    return [found[key] for key in sorted(found)]


def score_curves(evaluations: Sequence[Event]) -> dict[str, dict[str, list[Any]]]:
    """Return {"step", "tokens", "seconds", "value", "stderr"} by score name (with its suite, if there are several)."""
    suites = {evaluation["suite"] for evaluation in evaluations}
    found: dict[str, dict[str, list[Any]]] = {}
    for evaluation in evaluations:
        for name, value in evaluation["scores"].items():
            label = name if len(suites) == 1 else f"{evaluation['suite']}: {name}"
            curve = found.setdefault(label, {key: [] for key in POINT})
            for key in ("step", "tokens", "seconds"):
                curve[key].append(evaluation[key])
            curve["value"] += rounded([number(value)])
            curve["stderr"] += rounded([number(evaluation["stderr"].get(name))])
    return found


def newest_samples(run: RunFiles) -> dict[str, Any] | None:
    """Return the step and the (prompt, text) pairs of the newest evaluation that has samples."""
    for result in reversed(run.evals):
        texts = result.get("samples")
        if isinstance(texts, list) and texts:
            pairs = [(str(t.get("prompt", "")), str(t.get("text", ""))) for t in texts if isinstance(t, dict)]
            return {"step": result["step"], "texts": pairs}
    return None


def _evaluation(source: Event, suite: str, seconds: float) -> Event:
    errors = source.get("stderr")
    return {
        "suite": suite,
        "step": source["step"],
        "tokens": source["tokens"] if is_count(source.get("tokens")) else None,
        "seconds": round(seconds, 2),
        "scores": source["scores"],
        "stderr": errors if isinstance(errors, dict) else {},
    }
