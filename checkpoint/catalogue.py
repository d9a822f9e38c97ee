"""The checkpoints folder of a run: which checkpoints it has, which one a user means, and which may be deleted."""

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from minka.checkpoint.commit import delete_unless_leased, step_name, steps_among
from minka.checkpoint.filesystem import LOCAL, FileSystem
from minka.checkpoint.manifest import NAME, Damage, Header, read_header
from minka.checkpoint.reader_lease import is_leased
from minka.checkpoint.stored_checkpoint import StoredCheckpoint
from minka.plan.checkpoint_disk import check_mounted
from minka.plan.checkpoint_owner import check_own, difference_of_runs
from minka.plan.errors import UserError
from minka.plan.retention import Kept, expendable
from minka.plan.run_folder import RunFolder

MAX_NUMBER = 2**62


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, by step."""
    return [folder / step_name(step) for step in steps_of(folder) if (folder / step_name(step) / NAME).is_file()]


def find_checkpoint(folder: Path, step: str = "") -> Path:
    """The newest checkpoint, whole or not, or that of `step`. Raises UserError without one, and for a foreign one."""
    check_mounted(folder)
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]
    remedy = f"steps saved here: {', '.join(map(str, saved))}" if saved else "train the run first"
    asked = [at for at in steps_of(folder) if step.isdecimal() and at == int(step)]
    chosen = asked if step else newest_first(folder)
    if not chosen:
        raise UserError(f"no checkpoint of step {step}" if step else "no checkpoint", where=str(folder), remedy=remedy)
    path = folder / step_name(chosen[0])
    if chosen[0] not in saved:
        raise UserError("there is no such file: this checkpoint is damaged", where=str(path / NAME), remedy=remedy)
    header = _header(folder, chosen[0], LOCAL)
    if header:  # where it cannot be read, its reader says why
        check_own(RunFolder(folder.parent), path, header.state)
    return path


def run_and_step(given: str) -> tuple[str, str]:
    """RUN or RUN@STEP as (run, step or ""); the path of a run's run.toml means the run."""
    path = Path(given)
    name, at, step = path.name.partition("@")
    if at and not step:
        raise UserError("no step follows the @", where=given, remedy=f"{given}STEP, or {given[:-1]} for the newest")
    return str(path.parent if name == "run.toml" else path.parent / name), step


def steps_of(folder: Path, fs: FileSystem = LOCAL) -> list[int]:
    """Steps of all folders with a checkpoint's name, whole or not, ascending."""
    return steps_among(fs.listdir(folder))


def newest_first(folder: Path, fs: FileSystem = LOCAL) -> list[int]:
    """Steps in the order of a restore: saved last first; before all, those whose manifests cannot be read."""
    headers = {step: _header(folder, step, fs) for step in steps_of(folder, fs)}
    numbers = {step: header.number if header else 2**63 for step, header in headers.items()}
    return sorted(numbers, key=lambda step: (numbers[step], step), reverse=True)


def whole_newest_first(folder: Path) -> Iterator[int]:
    """`newest_first` without those whose manifest or index is damaged, or of which a file is cut, missing or too many.

    Shards are not read. Raises UserError for one of a different run.
    """
    for step in newest_first(folder):
        path = folder / step_name(step)
        with suppress(OSError, Damage):
            stored = StoredCheckpoint(path)
            check_own(RunFolder(folder.parent), path, stored.header.state)
            stored.check_files()
            yield step


class Catalogue:
    """The run's checkpoints, for its one writer. A manifest never changes, so each is read once."""

    def __init__(self, folder: Path, fs: FileSystem = LOCAL) -> None:
        self.folder, self.fs, self._run = folder, fs, RunFolder(folder.parent)
        self._known: dict[int, Kept] = {}

    def add(self, kept: Kept) -> None:
        """Add one that was just written."""
        self._known[kept.step] = kept

    def all(self) -> list[Kept]:
        """Those whose manifests can be read. One of a different run is neither counted nor deleted."""
        known = {}
        for step in steps_of(self.folder, self.fs):
            if step in self._known:
                known[step] = self._known[step]
            elif (header := _header(self.folder, step, self.fs)) and not difference_of_runs(self._run, header.state):
                known[step] = Kept(header.step, header.number, header.permanent)
        self._known = known
        return list(known.values())

    def next_number(self) -> int:
        """A number above that of every checkpoint here."""
        highest = max((kept.number for kept in self.all()), default=0)
        clock = time.time_ns() // 1000  # above those that cannot be read now, unless it has been set back
        return min(max(highest + 1, clock), MAX_NUMBER)

    def prune(self, newest: int) -> list[Path]:
        """Delete the checkpoints that retention does not keep and no reader holds, and return their paths.

        Never raises OSError: what cannot be deleted stays. Damaged ones stay too, for a person to look at.
        """
        deleted = []
        with suppress(OSError):
            for step in expendable(self.all(), newest):
                path = self.folder / step_name(step)
                with suppress(OSError):
                    if delete_unless_leased(self.fs, path, partial(is_leased, self.folder.parent, path.name)):
                        deleted.append(path)
        return deleted


def _header(folder: Path, step: int, fs: FileSystem) -> Header | None:
    try:
        return read_header(folder / step_name(step), fs)
    except (OSError, Damage):
        return None
