"""Events marked on the curves: what happened to the run, by kind, with one line of text each."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minka.plan.ledger import number
from minka.plan.scores import caveat_of
from minka.report.curves import MAX_MARKS
from minka.report.downsample import evenly
from minka.report.run_files import Event


def events(kept: Sequence[Event]) -> dict[str, dict[str, list[Any]]]:
    """Return {"step", "tokens", "seconds", "text"} by kind, thinned evenly to MAX_MARKS."""
    by_kind: dict[str, list[Event]] = {}
    for event in kept:
        kind = "changed" if event["event"] == "start" and event.get("changed") else event["event"]
        if kind in TEXTS:
            by_kind.setdefault(kind, []).append(event)
    found = {}
    for kind, of_kind in by_kind.items():
        shown = [of_kind[i] for i in evenly(len(of_kind), MAX_MARKS).tolist()]
        found[kind] = {
            "step": [event["step"] for event in shown],
            "tokens": [event["tokens"] for event in shown],
            "seconds": [round(event["running_seconds"], 2) for event in shown],
            "text": [TEXTS[kind](event) for event in shown],
        }
    return found


def changed_settings(event: Event) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) of each setting that a start, or a fork, changed."""
    changed = event.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else ()
    return [(key, *pair) for key, pair in pairs if isinstance(pair, list) and len(pair) == 2]


def changes_text(event: Event) -> str:
    """Return the changed settings in words; empty if there are none."""
    return ", ".join(f"{key}: {old} → {new}" for key, old, new in changed_settings(event))


def format_bytes(count: object) -> str:
    """Return a size for people; empty if it is unknown."""
    known = number(count)
    if not math.isfinite(known):
        return ""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if known >= of:
            return f"{known / of:.3g} {unit}"
    return f"{known:.0f} B"


def _start(event: Event) -> str:
    ranks = event.get("ranks", "?")
    return f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {event.get('device', '?')}"


def _save(event: Event) -> str:
    return ", ".join(filter(None, [format_bytes(event.get("bytes")), "kept forever" if event.get("permanent") else ""]))


def _eval(event: Event) -> str:
    scores = event.get("scores")
    bits = scores.get("bits_per_byte") if isinstance(scores, dict) else None
    if not isinstance(bits, float):
        return str(event.get("suite"))
    return ", ".join(filter(None, [f"{event.get('suite', '')} {bits:.4f} bits per byte", caveat_of(event)]))


def _reason(event: Event) -> str:
    return str(event.get("reason", ""))


TEXTS: dict[str, Callable[[Event], str]] = {
    "start": _start,
    "changed": changes_text,
    "save": _save,
    "eval": _eval,
    "fallback": lambda event: f"{Path(str(event.get('path', ''))).name}: {_reason(event)}",
    **dict.fromkeys("skip suspect restore rewind restart save_failed report_failed refuse stop".split(), _reason),
}
