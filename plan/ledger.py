"""The ledger of a run: append-only JSON lines, one event a line. A crash costs at most one line."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

EVENTS = frozenset("start step detail save eval skip suspect rewind restore fallback restart stop refuse".split()) | {
    "save_failed",
    "report_failed",
}
# After one of these the run is back at the event's step: per-step events beyond it belong to an abandoned lineage.
RETURNS = frozenset({"restore", "rewind", "restart"})
PER_STEP = frozenset({"step", "skip", "suspect", "detail", "eval"})
SETTINGS = frozenset({"config", "changed", "lineage"})  # fields that hold a user's strings: a run may be called NaN
STEP = b'{"event": "step"'  # how the line of a step begins
DEEPEST = 100  # levels of nesting; no event has more
BLOCK_BYTES = 2**20


class Ledger:
    """Appends events. Opened by one process: rank 0 of the run."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        # A crash may have cut the last line. End it, so that the next event gets a line of its own.
        self._waiting = b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b""

    def append(self, event: str, *, step: int, tokens: int, **fields: object) -> bool:
        """Write one event. Return False when the disk refused it; it is then written with a later one."""
        if event not in EVENTS:
            raise ValueError(f"{event!r} is not a ledger event; known: {sorted(EVENTS)}")
        line = {"event": event, "time": self._clock(), "step": step, "tokens": tokens, **fields}
        self._waiting += json.dumps(finite(line), allow_nan=False).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Flush to the disk and close. What the disk refuses now is lost; the run is not."""
        with suppress(OSError):
            os.fsync(self._file)
        with suppress(OSError):
            os.close(self._file)


def read_ledger(path: Path, torn: Callable[[int], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """Yield the events of a ledger in order, non-finite numbers as floats again.

    In each event, `event` is a word, `step` and `tokens` are counts, and `time` is a number. Other lines (cut off by a
    crash, damaged on the disk) are left out, and `torn` gets their numbers, from 1.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            event = parse_event(line)
            if event is not None:
                yield event
            elif line.strip():
                torn(number)


def lines_from_end(file: BinaryIO, end: int | None = None, *, skip: bytes = b"\n") -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the file, line) from the last line before `end` to the first.

    Lines that begin with `skip` are left out. The file is read in blocks, from its end.
    """
    start = file.seek(0, os.SEEK_END) if end is None else end
    rest = b""  # the beginning of the block after this one: the end of a line that begins in this one
    while start > 0:
        size = min(BLOCK_BYTES, start)
        start = file.seek(start - size)
        first, *lines = (file.read(size) + rest).split(b"\n")
        ends = list(accumulate(map(len, lines)))
        for i in [i for i, line in enumerate(lines) if line and not line.startswith(skip)][::-1]:
            yield start + len(first) + 1 + ends[i] - len(lines[i]) + i, lines[i]
        rest = first
    if rest and not rest.startswith(skip):
        yield 0, rest


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where the line does not hold one."""
    try:
        event = parse_json(line)
    except ValueError:
        return None
    kind = event.get("event") if isinstance(event, dict) else None
    if not (isinstance(kind, str) and kind.isidentifier() and abs(number(event.get("time"))) < 1e15):
        return None
    if not (is_count(event.get("step")) and is_count(event.get("tokens"))):
        return None
    return {key: value if key in SETTINGS else _floats(value) for key, value in event.items()}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from any source. Raises ValueError where it is not JSON, not UTF-8, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return value
        nested = [inner for inner in level if isinstance(inner, dict | list)]
        level = [inner for outer in nested for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError("nested too deeply")


def number(value: object) -> float:
    """A ledger's number as a float; NaN for any other value, and for an integer too large for a float."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def is_count(value: object) -> bool:
    """Whether `value` can be a number of steps or of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def current(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The events that still count: per-step events beyond the step of a later return are left out."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] in RETURNS:
            kept = [e for e in kept if e["event"] not in PER_STEP or e["step"] <= event["step"]]
        kept.append(dict(event))
    return kept


def finite(value: Any) -> Any:
    """`value` with non-finite floats as the strings NaN, Infinity, -Infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
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
