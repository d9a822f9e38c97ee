"""The scores and samples of a run's evaluations, from its ledger and from evals/."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minka.plan.ledger import is_count, number
from minka.plan.load_config import flatten
from minka.report.curves import Columns
from minka.report.downsample import rounded
from minka.report.headline import SUITE
from minka.report.run_files import Event, RunFiles


def eval_scores(run: RunFiles, steps: Columns) -> dict[tuple[str, str], list[Event]]:
    """Return the points of each (set, score) by step: {"step", "tokens", "seconds", "value", "stderr"}.

    They come from the ledger, and from later evaluations of checkpoints (evals/). The set is the suite's name where it
    was scored with the run's newest settings; other settings are other sets of numbers, and are named (`set_name`).
    """
    own = own_settings(run.config)
    settings: dict[str, Any] | None = None
    results: dict[tuple[str, int], Event] = {}
    for event in run.kept:
        if event["event"] == "start" and isinstance(event.get("config"), dict):
            settings = own_settings(flatten(event["config"]))
        if event["event"] == "eval" and isinstance(event.get("scores"), dict):
            results[set_name(str(event.get("suite", "")), settings, own), event["step"]] = event
    end = max([*steps["step"].tolist(), *(step for _, step in results)], default=math.inf)
    for result in run.evals:
        if result["step"] <= end:  # later ones are of steps that count no more
            seconds = float(np.interp(result["step"], steps["step"], steps["seconds"])) if len(steps["step"]) else 0.0
            name = set_name(result["suite"], result.get("settings"), own)
            results.setdefault((name, result["step"]), {**result, "running_seconds": seconds})
    points: dict[tuple[str, str], list[Event]] = {}
    for (suite, step), result in sorted(results.items(), key=lambda item: item[0]):
        errors = result.get("stderr")
        for name, value in result["scores"].items():
            point = {
                "step": step,
                "tokens": result["tokens"] if is_count(result.get("tokens")) else None,
                "seconds": round(result["running_seconds"], 2),
                "value": number(value),
                "stderr": errors.get(name) if isinstance(errors, dict) else None,
            }
            points.setdefault((suite, name), []).append(point)
    return points


def own_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's own evaluations (eval/bits_per_byte.py), from its flat configuration."""
    length = config.get("data.seq_len")
    stride = max(1, length // 2) if isinstance(length, int) else None
    return {"max_documents": config.get("eval.max_documents"), "window": length, "stride": stride}


def set_name(suite: str, settings: object, own: Mapping[str, Any]) -> str:
    """Return `suite`, and what was set differently from the run's `own` settings; unknown settings are its own."""
    if not isinstance(settings, dict):
        return suite
    unlike = {key: value for key, value in settings.items() if value is not None and own.get(key) not in (None, value)}
    if "window" in unlike:
        unlike.pop("stride", None)
    return " ".join([suite, *(f"{key}={value}" for key, value in unlike.items())])


def score_curves(scores: dict[tuple[str, str], list[Event]]) -> dict[str, dict[str, list[Any]]]:
    """Return the points as columns, by score name, with its suite if that is not SUITE: equal names in all runs."""
    found = {}
    for (suite, name), points in scores.items():
        at = {key: [point[key] for point in points] for key in ("step", "tokens", "seconds")}
        rest = {key: rounded([number(point[key]) for point in points]) for key in ("value", "stderr")}
        found[name if suite == SUITE else f"{suite}: {name}"] = at | rest
    return found


def newest_samples(run: RunFiles) -> dict[str, Any] | None:
    """Return the step and the (prompt, text) pairs of the newest evaluation that has samples."""
    for result in reversed(run.evals):
        texts = result.get("samples")
        if isinstance(texts, list) and texts:
            pairs = [(str(t.get("prompt", "")), str(t.get("text", ""))) for t in texts if isinstance(t, dict)]
            return {"step": result["step"], "texts": pairs}
    return None
