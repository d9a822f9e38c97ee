"""Exit statuses, and errors for users: one paragraph, no traceback."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit status of a command; schedulers and scripts act on it."""

    DONE = 0
    FAILED = 1  # something broke that the caller did not cause
    REFUSED = 2  # bad input or configuration; nothing was touched
    STOPPED = 85  # stopped and saved: run the same command again
    NEEDS_PERSON = 86  # a person must decide
    HUNG = 88  # a rank made no progress within guard.hang_seconds
    BAD_NODE = 89  # this machine should not be used

    @property
    def reason(self) -> str:
        """The status in words."""
        return {
            ExitStatus.DONE: "done",
            ExitStatus.REFUSED: "refused",
            ExitStatus.STOPPED: "stopped and saved",
            ExitStatus.NEEDS_PERSON: "stopped by a rule",
            ExitStatus.HUNG: "hung",
            ExitStatus.BAD_NODE: "this machine should not be used",
        }.get(self, "failed")


class UserError(Exception):
    """An error for users: what is wrong, where, why, and what to do.

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
        """For `--json`."""
        return {
            "error": self.what,
            "where": self.where,
            "why": self.why,
            "remedy": self.remedy,
            "status": int(self.status),
        }
