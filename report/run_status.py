"""Whether a run is running, silent, or ended, and how. Decided from its ledger and its exit_reason.json."""

from typing import Any

from minka.plan.errors import ExitStatus
from minka.report.run_files import Event, RunFiles

CLOCK_SLACK_SECONDS = 2.0  # between the time of a file and the clock of the ledger
HANG_SECONDS = 600.0  # where the configuration does not say
ENDS: dict[int, tuple[str, str]] = {  # exit status -> kind, label
    ExitStatus.DONE: ("finished", "finished"),
    ExitStatus.STOPPED: ("stopped", "stopped and saved"),
    ExitStatus.NEEDS_PERSON: ("person", "needs a person"),
    ExitStatus.HUNG: ("failed", "hung"),
}


def run_status(run: RunFiles, now: float) -> dict[str, Any]:
    """Return the status of `run` at `now`, in Unix seconds: {"kind", "label", "why", "ended"}.

    `kind`: waiting, running, silent, finished, stopped, person or failed. `ended`: nothing more happens by itself.
    """
    # A failed export, or report, comes after the end.
    events = [event for event in run.events if event["event"] not in ("save_failed", "report_failed")]
    end, code = run.exit_reason, run.exit_reason.get("code")
    if isinstance(code, int) and (not events or _is_of_last_session(end, events[-1])):
        label = "failed" if code in set(ExitStatus) else f"exit status {code}"
        return _status(*ENDS.get(code, ("failed", label)), str(end.get("reason", "")))
    if not events:
        return _status("waiting", "not started", "the ledger is empty")
    if events[-1]["event"] == "stop":
        reason = str(events[-1].get("reason", ""))
        by_reason = {ExitStatus(code).reason: end for code, end in ENDS.items()}
        return _status(*by_reason.get(reason.partition(":")[0], ("failed", "stopped")), reason)
    quiet = now - events[-1]["time"]
    if quiet > (run.planned.guard.hang_seconds if run.planned else HANG_SECONDS):
        why = f"no ledger line for {quiet / 60:,.0f} minutes: it was killed, or is in a very long step"
        return _status("silent", "silent", why)
    if not any(event["event"] == "step" for event in run.kept):
        return _status("running", "starting", "no step yet")
    return _status("running", "running")


def _is_of_last_session(end: dict[str, Any], last: Event) -> bool:
    """Whether exit_reason.json is not of an earlier session: that one stays until the next end."""
    step = end.get("step")
    fresh = end["written"] >= last["time"] - CLOCK_SLACK_SECONDS
    return bool(fresh and (not isinstance(step, int) or step >= last["step"]))


def _status(kind: str, label: str, why: str = "") -> dict[str, Any]:
    ended = kind in ("finished", "stopped", "person", "failed")
    return {"kind": kind, "label": label, "why": "" if why in (label, "done") else why, "ended": ended}
