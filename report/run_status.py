"""What a run is doing: running, silent, or ended, and how; from its ledger and the exit reason it left."""

from typing import Any, NamedTuple

from minka.plan.errors import ExitStatus
from minka.report.load_run import Run

SLACK_SECONDS = 2.0  # between a file's time and the clock of the ledger
HANG_SECONDS = 600.0  # where the configuration does not say
KINDS = {
    ExitStatus.DONE: ("finished", "finished"),
    ExitStatus.STOPPED: ("stopped", "stopped and saved"),
    ExitStatus.NEEDS_PERSON: ("person", "needs a person"),
    ExitStatus.HUNG: ("failed", "hung"),
}


class RunStatus(NamedTuple):
    """`kind`: waiting, running, silent, finished, stopped, person or failed; `label`, it in words; `why`, a reason."""

    kind: str
    label: str
    why: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be expected without somebody's doing."""
        return self.kind in ("finished", "stopped", "person", "failed")


def state_of(run: Run, now: float) -> RunStatus:
    """The run's state at `now`, in Unix seconds."""
    telling = [event for event in run.events if event["event"] != "save_failed"]  # a lost export comes after the end
    if _exit_counts(run, telling):
        code = int(run.ending["code"])
        kind, label = KINDS.get(ExitStatus(code), ("failed", "failed")) if code in set(ExitStatus) else _odd(code)
        reason = str(run.ending.get("reason", ""))
        return RunStatus(kind, label, "" if reason in (label, "done") else reason)
    if not telling:
        return RunStatus("waiting", "not begun", "nothing is in the ledger yet")
    if telling[-1]["event"] == "stop":
        return _stopped(str(telling[-1].get("reason", "")))
    hang = run.planned.guard.hang_seconds if run.planned else HANG_SECONDS
    quiet = now - telling[-1]["time"]
    if quiet > hang:
        return RunStatus("silent", "silent", f"no line for {quiet / 60:,.0f} minutes: killed, or in a very long step")
    if not any(event["event"] == "step" for event in run.kept):
        return RunStatus("running", "starting", "no step yet")
    return RunStatus("running", "running")


def _exit_counts(run: Run, telling: list[dict[str, Any]]) -> bool:
    """Whether exit_reason.json tells of the last session: one of a session before it stays until the next end."""
    if not isinstance(run.ending.get("code"), int):
        return False
    if not telling:
        return True
    last = telling[-1]
    if run.ending["written"] < last["time"] - SLACK_SECONDS:
        return False
    step = run.ending.get("step")
    return not isinstance(step, int) or step >= last["step"]


def _stopped(reason: str) -> RunStatus:
    for status, (kind, label) in KINDS.items():
        if status.reason == reason:
            return RunStatus(kind, label, "" if reason in (label, "done") else reason)
    return RunStatus("failed", "stopped", reason)


def _odd(code: int) -> tuple[str, str]:
    return "failed", f"exit status {code}"
