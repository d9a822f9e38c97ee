"""Whether a run is running, silent, or ended, and how. Decided from its ledger and its exit_reason.json."""

from typing import NamedTuple

from minka.plan.errors import ExitStatus
from minka.report.run_files import Event, RunFiles

CLOCK_SLACK_SECONDS = 2.0  # between the time of a file and the clock of the ledger
HANG_SECONDS = 600.0  # where the configuration does not say
ENDS: dict[int, tuple[str, str]] = {
    ExitStatus.DONE: ("finished", "finished"),
    ExitStatus.STOPPED: ("stopped", "stopped and saved"),
    ExitStatus.NEEDS_PERSON: ("person", "needs a person"),
    ExitStatus.HUNG: ("failed", "hung"),
}


class RunStatus(NamedTuple):
    """`kind`: waiting, running, silent, finished, stopped, person or failed. `label`: in words. `why`: the reason."""

    kind: str
    label: str
    why: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless a person acts."""
        return self.kind in ("finished", "stopped", "person", "failed")


def run_status(run: RunFiles, now: float) -> RunStatus:
    """Return the status of `run` at `now`, in Unix seconds."""
    events = [event for event in run.events if event["event"] != "save_failed"]  # a failed export comes after the end
    if _exit_reason_counts(run, events):
        code = int(run.exit_reason["code"])
        label = "failed" if code in set(ExitStatus) else f"exit status {code}"
        return _ended(*ENDS.get(code, ("failed", label)), str(run.exit_reason.get("reason", "")))
    if not events:
        return RunStatus("waiting", "not started", "the ledger is empty")
    if events[-1]["event"] == "stop":
        reason = str(events[-1].get("reason", ""))
        by_reason = {ExitStatus(code).reason: end for code, end in ENDS.items()}
        return _ended(*by_reason.get(reason, ("failed", "stopped")), reason)
    hang = run.planned.guard.hang_seconds if run.planned else HANG_SECONDS
    quiet = now - events[-1]["time"]
    if quiet > hang:
        why = f"no ledger line for {quiet / 60:,.0f} minutes: it was killed, or is in a very long step"
        return RunStatus("silent", "silent", why)
    if not any(event["event"] == "step" for event in run.kept):
        return RunStatus("running", "starting", "no step yet")
    return RunStatus("running", "running")


def _exit_reason_counts(run: RunFiles, events: list[Event]) -> bool:
    """Whether exit_reason.json is of the last session: that of an earlier session stays until the next end."""
    if not isinstance(run.exit_reason.get("code"), int):
        return False
    if not events:
        return True
    last, step = events[-1], run.exit_reason.get("step")
    if run.exit_reason["written"] < last["time"] - CLOCK_SLACK_SECONDS:
        return False
    return not isinstance(step, int) or step >= last["step"]


def _ended(kind: str, label: str, reason: str) -> RunStatus:
    return RunStatus(kind, label, "" if reason in (label, "done") else reason)
