"""Exit statuses and the errors that people read: one table, one paragraph, no traceback."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """What a finished command tells its caller; schedulers and scripts act on these."""

    DONE = 0
    FAILED = 1  # something broke that was not the caller's doing
    REFUSED = 2  # bad input or configuration; nothing was touched
    STOPPED = 85  # stopped and saved: run the same command again
    NEEDS_PERSON = 86  # stopped by a rule that only a person may lift
    HUNG = 88  # a rank made no progress within guard.hang_seconds
    BAD_NODE = 89  # this machine should not be used

    @property
    def reason(self) -> str:
        """The same in words."""
        return {
            ExitStatus.DONE: "done",
            ExitStatus.REFUSED: "refused",
            ExitStatus.STOPPED: "stopped and saved",
            ExitStatus.NEEDS_PERSON: "stopped by a rule",
            ExitStatus.HUNG: "hung",
            ExitStatus.BAD_NODE: "this machine should not be used",
        }.get(self, "failed")


class UserError(Exception):
    """An error for people: what is wrong, where, why, and what would work.

    `str()` gives one paragraph. The front door prints it and exits with `status`.
    """

    def __init__(
        self, what: str, *, where: str = "", why: str = "", remedy: str = "", status: ExitStatus = ExitStatus.REFUSED
    ) -> None:
        self.what, self.where, self.why, self.remedy, self.status = what, where, why, remedy, status
        super().__init__(what, where, why, remedy)

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what, self.why, self.remedy]
        return " ".join(part if part.endswith((".", "?", "!")) else part + "." for part in parts if part)

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`."""
        return {
            "error": self.what,
            "where": self.where,
            "why": self.why,
            "remedy": self.remedy,
            "status": int(self.status),
        }
