"""The checkpoints folder of a run: which checkpoints are there, which one is meant, and which may go."""

import time
from pathlib import Path

from minka.parallel.commit import retire, step_name, steps_among
from minka.parallel.disk import LOCAL, Disk
from minka.parallel.lease import is_leased
from minka.parallel.manifest import NAME, Damage, load_manifest
from minka.plan.errors import UserError
from minka.plan.retention import Kept, expendable


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
    return folder / step_name(newest_first(folder)[0])


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


def next_number(folder: Path, disk: Disk = LOCAL) -> int:
    """More than any checkpoint here has: microseconds of the clock, since one that cannot be read just now may be the
    newest, or one more than the highest, since a clock can be set back."""
    highest = max((kept.number for kept in all_kept(folder, disk)), default=0)
    return max(highest + 1, time.time_ns() // 1000)


def all_kept(folder: Path, disk: Disk = LOCAL) -> list[Kept]:
    """The checkpoints whose manifests can be read."""
    found = (_kept(folder / step_name(step), disk) for step in steps_of(folder, disk))
    return [kept for kept in found if kept]


def prune(folder: Path, newest: int, disk: Disk = LOCAL) -> list[Path]:
    """Delete what retention lets go and no reader holds, and give those that are gone.

    Never raises OSError: what cannot be deleted stays. Damaged ones stay too: they are for a person to look at.
    """
    gone = []
    try:
        steps = expendable(all_kept(folder, disk), newest)
    except OSError:
        return []
    for step in steps:
        path = folder / step_name(step)
        try:
            if retire(disk, path, lambda path=path: is_leased(folder.parent, path.name)):  # type: ignore[misc]
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
