"""The run file of a budget's plan: what `minka train` takes, with every choice and where it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from minka.plan.atomic import write_text, writing
from minka.plan.cadence import Cadence, hours_between_failures
from minka.plan.compute_budget import WHERE
from minka.plan.errors import UserError
from minka.plan.load_config import load_run

DEFAULT = {"shard": 0, "micro_batch": 1}
SAVE_SECONDS, RESTART_SECONDS = 20.0, 600.0  # as `minka plan cadence` assumes
SMALL = 3e6  # weights: of models below, the demo's data


def run_of(
    found: Mapping[str, Any], name: str, data: Mapping[str, Any], layout: Mapping[str, Any] = DEFAULT
) -> dict[str, Any]:
    """Return the run file of a plan as a table. `data` is the section of that name, but for lengths."""
    shape, schedule = found["shape"], found["schedule"]
    batch, steps = found["batch_tokens"]["value"], schedule["steps"]
    vocab = {"tokenizer": "bytes"} if shape["vocab"] == 256 else {}
    every = _save_every(found)
    return {
        "format": 1,
        "run": {"name": name, "max_tokens": steps * batch},
        "model": {**shape, "max_positions": found["seq_len"]},
        "data": {**data, **vocab, "seq_len": found["seq_len"], "batch_tokens": batch},
        "optimizer": {
            "learning_rate": _figures(found["learning_rate"]["value"]),
            "beta2": found["beta2"]["value"],
            "weight_decay": _figures(found["weight_decay"]["value"]),
        },
        "schedule": {
            "kind": schedule["kind"],
            "unit": "steps",
            "warmup": schedule["warmup_steps"],
            "final_ratio": schedule["final_ratio"],
        },
        "layout": {**layout},
        "checkpoint": {"every_steps": every, "keep": 3},
        "plan": _planned(found),
        "eval": {"every_steps": max(1, steps // (10 if found["parameters"] < SMALL else 50))},
    }


def _planned(found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found["loss_interval"]
    numbers = {"loss": found["loss"], "loss_low": low, "loss_high": high}
    price = found["dollars"] / found["gpu_hours"] if found["dollars"] else None
    planned = {"law": found["law"], **{key: float(f"{value:.5g}") for key, value in numbers.items()}}
    return planned if price is None else {**planned, "dollars_per_gpu_hour": _figures(price)}


def _save_every(found: Mapping[str, Any]) -> int:
    """Steps between saves: by the failures of so many nodes, or without a machine a twentieth of the run."""
    steps = found["schedule"]["steps"]
    if not found["days"]:
        return max(1, steps // 20)
    cadence = Cadence(SAVE_SECONDS, RESTART_SECONDS, hours_between_failures(found["gpus"], "rsc-1") * 3600)
    return max(1, min(steps // 5, round(cadence.best / (found["days"] * 86_400 / steps))))


def _figures(value: float) -> float:
    return float(f"{value:.3g}")


def data_section(recipe: str) -> dict[str, Any]:
    """Return the data of a recipe or run, but for lengths. Raises UserError."""
    data = load_run(recipe).config.data.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in data.items() if key not in ("seq_len", "batch_tokens", "batch_warmup")}


def write_run(path: Path, found: Mapping[str, Any], layout: Mapping[str, Any], data_of: str = "") -> None:
    """Write the run file. `layout` may be empty. `data_of` names a recipe or run whose data it takes.

    Raises UserError.
    """
    if path.suffix != ".toml":
        raise UserError(f"{path} does not end in .toml", where="--emit", remedy=f"write --emit {path.stem}.toml")
    size = found["parameters"]
    values = run_of(
        found, path.stem, data_section(data_of or ("demo" if size < SMALL else "dense-125m")), layout or DEFAULT
    )
    low, high = found["loss_interval"]
    batch, rate = found["batch_tokens"], found["learning_rate"]
    lines = [
        f"# Made by `{WHERE}`: {size:,} weights, {found['tokens']:,} tokens, {found['flops']:.3g} FLOPs.",
        f"# Loss: {found['loss']:.3f} nats a token, {low:.3f} to {high:.3f}, by the law {found['law']!r}:",
        f"# {found['law_source']}.",
        f"# Batch: {batch['source']}; laws span {batch['low']:,.0f} to {batch['high']:,.0f} tokens.",
        f"# Learning rate: {rate['source']}; laws span {rate['low']:.2g} to {rate['high']:.2g}.",
        f"# Weight decay: {found['weight_decay']['source']}.",
    ]
    if path.exists():
        raise UserError("exists", where=f"--emit {path}", remedy="remove it, or choose a different name")
    with writing(path, "choose a different file (--emit)"):
        write_text(path, "\n".join(lines) + "\n\n" + tomli_w.dumps(values))
