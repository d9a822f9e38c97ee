"""`minka plan calibrate`: the steps of measured runs, and the rates that explain them."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.atomic import write_text, writing
from minka.plan.calibrate import Measured, calibrate, errors
from minka.plan.cluster import Cluster, cluster_of, find_cluster
from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.hardware import find_gpu
from minka.plan.ledger import number, read_ledger
from minka.plan.load_config import validate
from minka.plan.rates import FITTED, rates_toml
from minka.plan.run_folder import find_run
from minka.plan.run_job import job_of

LEAST_WINDOWS = 2  # readings of a run's speed, the first one left out: it compiles and allocates


class RunStep(NamedTuple):
    """What a run's ledger says about its steps."""

    name: str
    device: str
    config: RunConfig
    ranks: int
    seconds: float  # of a step


def read_run(given: str) -> RunStep:
    """Return the last training of a run that took whole batches. Raises UserError where it is too short."""
    folder = find_run(given)
    start: dict[str, Any] = {}
    speeds: list[float] = []
    whole = 0  # tokens after which each reading is of whole batches
    for event in read_ledger(folder.ledger_file):
        if event["event"] == "start":
            start, speeds, whole = event, [], _warmed_up(event)
        elif event["event"] == "step" and start:
            speed = number(event.get("tokens_per_second"))
            if (
                speed > 0 and event["tokens"] > whole and (not speeds or speed != speeds[-1])
            ):  # all steps of a reading have the same
                speeds.append(speed)
    remedy = "train it for some more steps, or leave it out"
    if len(speeds) <= LEAST_WINDOWS:
        what = f"{len(speeds)} readings of its speed are too few"
        raise UserError(what, where=str(folder.path), why="the first is left out: it compiles", remedy=remedy)
    config = validate(dict(start.get("config", {})), f"{folder.ledger_file}, its last start").after_warmup()
    seconds = config.data.batch_tokens / statistics.median(speeds[1:])
    return RunStep(config.run.name, str(start.get("device", "")), config, int(start.get("ranks", 1)), seconds)


def _warmed_up(start: Mapping[str, Any]) -> int:
    """Tokens at the end of a batch warm-up, and of the reading that it ends in."""
    config: dict[str, Any] = start.get("config") or {}
    data, every = config.get("data", {}), config.get("tracking", {}).get("log_every", 1)
    ends = [stage["until_tokens"] for stage in data.get("batch_warmup", ())]
    return max(ends) + every * data["batch_tokens"] if ends else 0


def measured(run: RunStep, cluster: Cluster) -> Measured:
    """Return the run's step as the planner sees it."""
    return Measured(job_of(run.config, run.config.check(run.ranks), cluster), run.seconds)


def _cluster_of(device: str) -> Cluster:
    gpu = find_gpu(device)
    if gpu is None:
        remedy = "describe it: --gpu machine.toml; for these cores, `minka doctor --machine machine.toml` writes that"
        raise UserError(f"the rates of {device!r} are not known", where="minka plan calibrate", remedy=remedy)
    return cluster_of(gpu)


def calibrate_plan(runs: Sequence[str], gpu: str, output: Path | None) -> dict[str, Any]:
    """Fit the rates to the runs, write them to `output`, and return what the JSON has. Raises UserError."""
    read = [read_run(run) for run in runs]
    devices = {run.device for run in read}
    if len(devices) > 1:
        remedy = "calibrate each device on its own runs"
        raise UserError(f"these runs were on {', '.join(sorted(devices))}", where="minka plan calibrate", remedy=remedy)
    cluster = find_cluster(gpu) if gpu else _cluster_of(next(iter(devices)))
    steps = [measured(run, cluster) for run in read]
    source = f"{', '.join(run.name for run in read)} ({next(iter(devices))})"
    found = calibrate(cluster, steps, source)
    left_out: list[float | None] = [
        errors(calibrate(cluster, [*steps[:at], *steps[at + 1 :]], source), [steps[at]])[0]
        for at in range(len(steps))
        if len(steps) > 1
    ]
    if output:
        with writing(output, "choose a different file (-o)"):
            write_text(output, rates_toml(found.rates))
    rows = zip(read, steps, errors(cluster, steps), errors(found, steps), left_out or [None], strict=False)
    return {
        "gpu": cluster.name,
        "calibrated": found.rates.described(),
        "rates": {key: getattr(found.rates, key) for key in FITTED},
        "tabulated": {key: getattr(cluster.rates, key) for key in FITTED},
        "runs": [
            {
                "run": run.name,
                "ranks": run.ranks,
                "step_seconds": step.seconds,
                "error_before": before,
                "error": after,
                "error_left_out": left,
            }
            for run, step, before, after, left in rows
        ],
        "file": str(output) if output else None,
    }


def calibrate_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of a table for people."""
    rows = [["rate", "fitted", "tabulated"]]
    rows += [[f"  {key}", f"{value:.3g}", f"{found['tabulated'][key]:.3g}"] for key, value in found["rates"].items()]
    rows.append(["run", "step", "predicted before, after, by the others alone"])
    for run in found["runs"]:
        off = [run["error_before"], run["error"], run["error_left_out"]]
        text = ", ".join("-" if error is None else f"{error:+.1%}" for error in off)
        rows.append([f"  {run['run']}, {run['ranks']:,} ranks", f"{run['step_seconds']:.3g} s", text])
    rows.append(["written", found["file"] or "nothing: -o FILE.toml", "for --rates"])
    return rows
