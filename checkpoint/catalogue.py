"""The checkpoints folder of a run: which checkpoints it has, which one a user means, and which may be deleted."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from minka.checkpoint.commit import delete_unless_leased, step_name, steps_among
from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.manifest import NAME, Damage, Header, read_header
from minka.checkpoint.reader_lease import is_leased
from minka.plan.errors import UserError
from minka.plan.retention import Kept, expendable

MAX_NUMBER = 2**62


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, by step."""
    return [folder / step_name(step) for step in steps_of(folder) if (folder / step_name(step) / NAME).is_file()]


def find_checkpoint(folder: Path, step: str = "") -> Path:
    """The newest checkpoint, or that of `step`. Raises UserError that names those that exist."""
    found = checkpoints(folder)
    chosen = [path for path in found if not step or (step.isdecimal() and path.name == step_name(int(step)))]
    if not chosen:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in found)
        raise UserError(
            f"no checkpoint of step {step}" if step else "no checkpoint",
            where=str(folder),
            remedy=f"steps saved here: {steps}" if found else "train the run first",
        )
    if step or len(chosen) == 1:
        return chosen[-1]
    return next(folder / step_name(s) for s in newest_first(folder) if folder / step_name(s) in chosen)


def run_and_step(given: str) -> tuple[str, str]:
    """RUN or RUN@STEP as (run, step or ""); the path of a run's run.toml means the run."""
    path = Path(given)
    name, _, step = path.name.partition("@")
    return str(path.parent if name == "run.toml" else path.parent / name), step


def steps_of(folder: Path, fs: FileSystem = LOCAL) -> list[int]:
    """Steps of all folders with a checkpoint's name, whole or not, ascending."""
    return steps_among(fs.listdir(folder))


def read_headers(folder: Path, fs: FileSystem = LOCAL) -> dict[int, Header | None]:
    """The header of each step, None where it cannot be read: opens every manifest once."""
    return {step: _header(folder, step, fs) for step in steps_of(folder, fs)}


def restore_order(headers: Mapping[int, Header | None]) -> list[int]:
    """Steps in the order in which a restore tries them: saved last first; before all, those that cannot be read."""
    last = 1 + max((header.number for header in headers.values() if header), default=0)
    return sorted(headers, key=lambda step: (header.number if (header := headers[step]) else last, step), reverse=True)


def newest_first(folder: Path, fs: FileSystem = LOCAL) -> list[int]:
    """The order of a restore, read from the folder."""
    return restore_order(read_headers(folder, fs))


class Catalogue:
    """The checkpoints of a folder, for its one writer. A manifest never changes, so each is read once."""

    def __init__(self, folder: Path, fs: FileSystem = LOCAL) -> None:
        self.folder, self.fs = folder, fs
        self._known: dict[int, Kept] = {}

    def add(self, kept: Kept) -> None:
        """Add one that was just written."""
        self._known[kept.step] = kept

    def all(self) -> list[Kept]:
        """The checkpoints whose manifests can be read."""
        known = {}
        for step in steps_of(self.folder, self.fs):
            if step in self._known:
                known[step] = self._known[step]
            elif header := _header(self.folder, step, self.fs):
                known[step] = Kept(header.step, header.number, header.permanent)
        self._known = known
        return list(known.values())

    def next_number(self) -> int:
        """A number above that of every checkpoint here.

        The clock's microseconds, since a checkpoint that cannot be read now may be the newest; but at least one more
        than the highest, since a clock can be set back.
        """
        highest = max((kept.number for kept in self.all()), default=0)
        return min(max(highest + 1, time.time_ns() // 1000), MAX_NUMBER)

    def prune(self, newest: int) -> list[Path]:
        """Delete the checkpoints that retention does not keep and no reader holds, and return their paths.

        Never raises OSError: what cannot be deleted stays. Damaged ones stay too, for a person to look at.
        """
        deleted = []
        try:
            steps = expendable(self.all(), newest)
        except OSError:
            return []
        for step in steps:
            path = self.folder / step_name(step)
            try:
                if delete_unless_leased(self.fs, path, partial(is_leased, self.folder.parent, path.name)):
                    deleted.append(path)
            except OSError:
                continue
        return deleted


def _header(folder: Path, step: int, fs: FileSystem) -> Header | None:
    try:
        return read_header(folder / step_name(step), fs)
    except (OSError, Damage):
        return None
