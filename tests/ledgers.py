"""Run folders written line by line: what a report must be able to read, whoever wrote it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs import SEQ, values
from minka.plan.ledger import finite
from minka.plan.load_config import dump_toml, validate
from minka.plan.run_folder import RunFolder
from minka.report.page_data import page_data
from minka.report.run_files import RunFiles

BEGAN = 1_700_000_000.0  # Unix seconds
BATCH = 4 * SEQ  # tokens a step, as in configs.values
Event = dict[str, Any]


def run_of(runs: Path, name: str, events: Iterable[Mapping[str, Any]], **sections: dict[str, Any]) -> RunFolder:
    """A run folder with these ledger lines, and the configuration of configs.values with `sections` over it."""
    folder = RunFolder(runs / name)
    folder.path.mkdir(parents=True)
    folder.config_file.write_text(dump_toml(validate(values(**sections), "tests/ledgers.py")))
    folder.ledger_file.write_text("".join(json.dumps(finite(event)) + "\n" for event in events))
    return folder


def event(kind: str, step: int, after: float | None = None, **fields: Any) -> Event:
    """One event, `after` seconds after the run began (default: a second a step)."""
    at = BEGAN + (step if after is None else after)
    return {"event": kind, "time": at, "step": step, "tokens": step * BATCH, **fields}


def steps(first: int, last: int, late: float = 0.0, **fields: Any) -> Iterator[Event]:
    """Steps first to last, one a second, `late` seconds later than the first session's would have been."""
    for n in range(first, last + 1):
        usual = {
            "loss": 4 - n / 100,
            "grad_norm": 1 + 1 / n,
            "learning_rate": 1e-3 * n,
            "seconds": {"data": 0.125, "compute": 0.5, "save": 0.0, "eval": 0.0},
            "tokens_per_second": 1000.0 + n,
            "mfu": None,
        }
        yield event("step", n, n + late, **usual | fields)


def start(step: int = 0, after: float | None = None, **fields: Any) -> Event:
    """A session's first event."""
    usual = {"ranks": 2, "device": "a processor", "layout": {"shard": 2, "replicate": 1}, "mfu_peak_flops": None}
    return event("start", step, step - 0.5 if after is None else after, **usual | fields)


def score(step: int, bits: float, error: float = 0.25, **more: float) -> Event:
    """An evaluation; `more` are sources."""
    by_source = {f"bits_per_byte/{name}": value for name, value in more.items()}
    scores = {"bits_per_byte": bits, **by_source}
    return event("eval", step, suite="heldout", scores=scores, stderr=dict.fromkeys(scores, error))


def ended(folder: RunFolder, code: int, step: int, reason: str = "done") -> None:
    """exit_reason.json, as a run leaves it."""
    folder.exit_file.write_text(json.dumps({"code": code, "reason": reason, "step": step, "requeue": False}))


def page_run(folder: RunFolder, now: float = BEGAN + 30) -> dict[str, Any]:
    """The run as the page has it at `now`."""
    shown: dict[str, Any] = page_data([RunFiles(str(folder.path))], now)["runs"][0]
    return shown


PAUSE = 1000.0
INTERRUPTED: list[Event] = [  # killed after step 8, resumed from step 5 with a different learning rate 1,000 s later
    start(),
    *steps(1, 5),
    event(
        "save", 5, path="x/checkpoints/step-00000005", bytes=10, stall_seconds=0.5, total_seconds=2.0, permanent=True
    ),
    *steps(6, 8, loss=99.0),
    score(8, 9.0),
    event("fallback", 5, 8 + PAUSE, path="x/checkpoints/step-00000007", reason="a hash is wrong"),
    event("restore", 5, 8 + PAUSE, reason="the run is going on"),
    start(5, 9 + PAUSE, changed={"optimizer.learning_rate": [1e-3, 2e-3]}),
    *steps(6, 10, late=PAUSE + 4),
    score(10, 1.5),
    event("stop", 10, 10 + PAUSE + 4, reason="done"),
]
