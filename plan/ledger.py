"""The ledger of a run: append-only JSON lines, one event a line; a crash costs at most one of them."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

EVENTS = frozenset(
    "start step save save_failed eval skip suspect rewind restore fallback restart stop refuse detail".split()
)
# After one of these the run stands at the event's step again: what was recorded beyond it is of a lineage that ended.
RETURNS = frozenset({"restore", "rewind", "restart"})
PER_STEP = frozenset({"step", "skip", "suspect", "detail", "eval"})


class Ledger:
    """Append-only JSON lines, one event a line. Opened by one process: rank 0 of the run."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # A crash cut the last line: end it, so that the next event stands on its own.
        self._waiting = b"\n" if torn else b""

    def append(self, event: str, *, step: int, tokens: int, **fields: object) -> bool:
        """Write one event; false when the disk did not take it: then it waits and goes out with a later one.

        `step` and `tokens` count what was begun on the current lineage.
        """
        if event not in EVENTS:
            raise ValueError(f"{event!r} is no ledger event; known: {sorted(EVENTS)}")
        line = {"event": event, "time": self._clock(), "step": step, "tokens": tokens, **fields}
        self._waiting += json.dumps(finite(line), allow_nan=False).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)


def read_ledger(path: Path, torn: Callable[[int], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """The events of a ledger in order, non-finite numbers as floats again.

    A line that a crash cut off, or a disk mangled, is left out, and `torn` is told its number (from 1).
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
            except ValueError:  # no JSON, or no UTF-8
                event = None
            if isinstance(event, dict) and {"event", "time", "step", "tokens"} <= event.keys():
                yield _floats(event)
            elif line.strip():
                torn(number)


def current(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What counts of a ledger: per-step events that a later return to an earlier step made void are left out."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] in RETURNS:
            kept = [e for e in kept if e["event"] not in PER_STEP or e["step"] <= event["step"]]
        kept.append(dict(event))
    return kept


def finite(value: Any) -> Any:
    """`value` with non-finite floats as the strings NaN, Infinity, -Infinity (JSON has no word for them)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def _floats(value: Any) -> Any:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return value
