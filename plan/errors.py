"""Exit statuses, and errors for users: one paragraph, no traceback."""

import unicodedata
from enum import IntEnum

JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji are spelled with them


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
        words = {
            ExitStatus.STOPPED: "stopped and saved",
            ExitStatus.NEEDS_PERSON: "stopped by a rule",
            ExitStatus.BAD_NODE: "this machine should not be used",
        }
        return words.get(self, self.name.lower())


class UserError(Exception):
    """An error for users, one paragraph as `str()`. The front door prints it and exits with `status`."""

    def __init__(
        self, what: str, *, where: str = "", why: str = "", remedy: str = "", status: ExitStatus = ExitStatus.REFUSED
    ) -> None:
        self.what, self.where, self.why, self.remedy, self.status = what, where, why, remedy, status
        super().__init__(what, where, why, remedy)

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what, self.why, self.remedy]
        return visible(" ".join(part if part.endswith((".", "?", "!")) else part + "." for part in parts if part))

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        parts = {"where": self.where, "why": self.why, "remedy": self.remedy}
        return {"error": self.what, **parts, "status": int(self.status)}


def visible(text: str, keep: str = "") -> str:
    """Return `text` with escapes for all characters that do not print as themselves, but those of `keep`.

    For text of documents, models and paths: a terminal obeys control characters, and some reorder what is shown.
    All spaces of Unicode (U+3000, no-break ones) and the joiners are text.
    """
    return "".join(c if _is_text(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _is_text(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"
