"""The checkpoints folder of a run: which checkpoints are there, which one is meant, and which may go."""

import time
from functools import partial
from pathlib import Path

from minka.checkpoint.commit import retire, step_name, steps_among
from minka.checkpoint.filesystem import LOCAL, Disk
from minka.checkpoint.manifest import NAME, Damage, load_manifest
from minka.checkpoint.reader_lease import is_leased
from minka.plan.errors import UserError
from minka.plan.retention import Kept, expendable

MOST_NUMBER = 2**62


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, by step."""
    return [folder / step_name(step) for step in steps_of(folder) if (folder / step_name(step) / NAME).is_file()]


def find_checkpoint(folder: Path, step: str = "") -> Path:
    """The newest checkpoint, or that of `step`. Raises UserError saying which there are."""
    found = checkpoints(folder)
    chosen = [path for path in found if not step or (step.isdecimal() and path.name == step_name(int(step)))]
    if not chosen:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in found)
        raise UserError(
            f"there is no checkpoint of step {step}" if step else "there is no checkpoint",
            where=str(folder),
            remedy=f"steps saved here: {steps}" if found else "train the run first",
        )
    if step or len(chosen) == 1:
        return chosen[-1]
    names = {path.name for path in chosen}
    return next(folder / step_name(s) for s in newest_first(folder) if step_name(s) in names)


def run_and_step(given: str) -> tuple[str, str]:
    """RUN or RUN@STEP as (run, step or ""); the path of a run's run.toml means the run."""
    path = Path(given)
    name, _, step = path.name.partition("@")
    return str(path.parent if name == "run.toml" else path.parent / name), step


def steps_of(folder: Path, disk: Disk = LOCAL) -> list[int]:
    """Steps of all folders with a checkpoint's name, whole or not, ascending."""
    return steps_among(disk.names(folder))


def newest_first(folder: Path, disk: Disk = LOCAL) -> list[int]:
    """Steps in the order in which a restore tries them: saved last first; those that cannot be read before all."""
    found = {step: _kept(folder / step_name(step), disk) for step in steps_of(folder, disk)}
    last = 1 + max((kept.number for kept in found.values() if kept), default=0)
    return sorted(found, key=lambda step: (kept.number if (kept := found[step]) else last, step), reverse=True)


class Catalogue:
    """The checkpoints of a folder, for its one writer. Manifests can be large and never change: each is read once."""

    def __init__(self, folder: Path, disk: Disk = LOCAL) -> None:
        self.folder, self.disk = folder, disk
        self._known: dict[int, Kept] = {}

    def add(self, kept: Kept) -> None:
        """One that was written just now."""
        self._known[kept.step] = kept

    def all(self) -> list[Kept]:
        """The checkpoints whose manifests can be read."""
        known = {}
        for step in steps_of(self.folder, self.disk):
            kept = self._known.get(step) or _kept(self.folder / step_name(step), self.disk)
            if kept:
                known[step] = kept
        self._known = known
        return list(known.values())

    def next_number(self) -> int:
        """More than any checkpoint here has: microseconds of the clock, since one that cannot be read just now may be
        the newest, or one more than the highest, since a clock can be set back."""
        highest = max((kept.number for kept in self.all()), default=0)
        return min(max(highest + 1, time.time_ns() // 1000), MOST_NUMBER)

    def prune(self, newest: int) -> list[Path]:
        """Delete what retention lets go and no reader holds, and give those that are gone.

        Never raises OSError: what cannot be deleted stays. Damaged ones stay too: they are for a person to look at.
        """
        gone = []
        try:
            steps = expendable(self.all(), newest)
        except OSError:
            return []
        for step in steps:
            path = self.folder / step_name(step)
            try:
                if retire(self.disk, path, partial(is_leased, self.folder.parent, path.name)):
                    gone.append(path)
            except OSError:
                continue
        return gone


def _kept(path: Path, disk: Disk) -> Kept | None:
    try:
        manifest = load_manifest(path, disk)
    except (OSError, Damage):
        return None
    return Kept(manifest["step"], manifest["number"], manifest["permanent"])
