"""Runs written by hand, line by line: what a report must be able to read, whoever wrote it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs import SEQ, values
from minka.plan.ledger import finite
from minka.plan.load_config import dump_toml, validate
from minka.plan.run_folder import RunFolder

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
