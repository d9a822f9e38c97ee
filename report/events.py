"""Events marked on the curves: what happened to the run, by kind, with a line of text each."""

import math
from collections.abc import Callable
from typing import Any

from minka.plan.ledger import number
from minka.report.downsample import spread
from minka.report.running_time import Clock
from minka.report.series import MOST_MARKS

Event = dict[str, Any]


def marks(kept: list[Event], clock: Clock) -> dict[str, dict[str, list[Any]]]:
    """Per kind: {"step", "tokens", "seconds", "text"}; evenly thinned where there are more than can be told apart."""
    found: dict[str, list[Event]] = {kind: [] for kind in KINDS}
    for event in kept:
        kind = "changed" if event["event"] == "start" and event.get("changed") else event["event"]
        if kind in found:
            found[kind].append(event)
    return {kind: _marks(kind, events, clock) for kind, events in found.items() if events}


def _marks(kind: str, events: list[Event], clock: Clock) -> dict[str, list[Any]]:
    shown = [events[i] for i in spread(len(events), MOST_MARKS).tolist()]
    return {
        "step": [event["step"] for event in shown],
        "tokens": [event["tokens"] for event in shown],
        "seconds": [round(clock.seconds(event["time"]), 2) for event in shown],
        "text": [KINDS[kind](event) for event in shown],
    }


def changes(event: Event) -> str:
    """What a start changed of the configuration, in words; empty if nothing."""
    changed = event.get("changed")
    if not isinstance(changed, dict):
        return ""
    pairs = ((key, value) for key, value in changed.items() if isinstance(value, list) and len(value) == 2)
    return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in pairs)


def size(count: object) -> str:
    """Bytes for people."""
    known = number(count)
    if not math.isfinite(known):
        return "?"
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if known >= of:
            return f"{known / of:.3g} {unit}"
    return f"{known:.0f} B"


def _reason(event: Event) -> str:
    return str(event.get("reason", ""))


def _score(event: Event) -> str:
    scores = event.get("scores")
    bits = scores.get("bits_per_byte") if isinstance(scores, dict) else None
    return f"{event.get('suite', '')} {bits:.4f} bits per byte" if isinstance(bits, float) else str(event.get("suite"))


def _ranks(event: Event) -> str:
    ranks = event.get("ranks", "?")
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {event.get('device', '?')}"


KINDS: dict[str, Callable[[Event], str]] = {  # in the order in which the page lists them
    "start": _ranks,
    "changed": changes,
    "save": lambda event: size(event.get("bytes")) + (", kept for ever" if event.get("permanent") else ""),
    "eval": _score,
    "skip": _reason,
    "suspect": _reason,
    "restore": _reason,
    "fallback": lambda event: f"{event.get('path', '')} {_reason(event)}",
    "rewind": _reason,
    "restart": _reason,
    "save_failed": _reason,
    "refuse": _reason,
    "stop": _reason,
}
