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
SETTINGS = frozenset({"config", "changed", "lineage"})  # fields with words of people: a run may be called NaN
STEP = b'{"event": "step"'  # as a line of a step begins
DEEPEST = 100  # values within values; what is deeper than this nobody meant


class Ledger:
    """Append-only JSON lines, one event a line. Opened by one process: rank 0 of the run."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        torn = _is_torn(path)
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


def read_ledger(
    path: Path, torn: Callable[[int], None] = lambda line: None, *, with_steps: bool = True
) -> Iterator[dict[str, Any]]:
    """The events of a ledger in order, non-finite numbers as floats again.

    Whatever is in the file: `event` is a word, `step` and `tokens` are counts, `time` is a number. A line that a crash
    cut off, or a disk mangled, is left out, and `torn` is told its number (from 1). Without its steps, which are nearly
    all of it, a ledger is read in no time.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not with_steps and line.startswith(STEP):
                continue
            try:
                event = parse(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and _is_event(event):
                yield {key: value if key in SETTINGS else _floats(value) for key, value in event.items()}
            elif line.strip():
                torn(number)


def parse(text: str | bytes) -> Any:
    """JSON that anybody may have written. Raises ValueError: no JSON, no UTF-8, or nested too deeply to be walked."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return value
        level = [inner for outer in level for inner in _inside(outer)]
    raise ValueError("nested too deeply")


def number(value: object) -> float:
    """What stands in a ledger for a number, as a float; NaN for anything else, and for what is too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def is_count(value: object) -> bool:
    """Whether it can be a number of steps or of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


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


def _is_event(event: dict[str, Any]) -> bool:
    kind, at = event.get("event"), event.get("time")
    if not (isinstance(kind, str) and kind.isidentifier() and is_count(event.get("step"))):
        return False
    return is_count(event.get("tokens")) and abs(number(at)) < 1e15


def _is_torn(path: Path) -> bool:
    """Whether a file's last line has no end; the rest of it, which may be large, is not read."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _floats(value: Any) -> Any:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return value
