"""checkpoint.folder: a run's checkpoints on another disk. The run's checkpoints/ is then a link to a folder there."""

import os
from itertools import count
from pathlib import Path

from minka.plan.atomic import sync, writing
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.read_file import reading
from minka.plan.run_folder import RunFolder

CLAIM = ".run"  # in the folder there: a link to the run that made it


def find_place(config: RunConfig) -> Path | None:
    """The folder in checkpoint.folder for the checkpoints of a run that has none; None where that is not set.

    Raises UserError when checkpoint.folder is missing, or something is in that place.
    """
    if not config.checkpoint.folder:
        return None
    run = RunFolder.of(config)
    disk = run.bases()[0] / Path(config.checkpoint.folder).expanduser()
    place = disk / run.path.absolute().name
    if any(run.path.glob("checkpoints.old-*")):  # of before --from-scratch: links to the folders there
        place = next(other for n in count(1) if not (other := place.with_name(f"{place.name}.{n}")).exists())
    problem, remedy = f"there is no folder {disk}", "make it, or mount its disk"
    with reading(place):
        if disk.is_dir() and _is_free(place, run):
            return place
        if disk.is_dir():
            problem = f"{place} is not empty, and may hold the checkpoints of a different run"
            remedy = f"choose a different run.name or checkpoint.folder, move it away, or link {run.checkpoints} to it"
    raise UserError(problem, where="checkpoint.folder", remedy=remedy)


def place_checkpoints(config: RunConfig) -> None:
    """Make checkpoints/ of a run that has none a link to `find_place`; for the run's one writer. Raises UserError."""
    place, link = find_place(config), RunFolder.of(config).checkpoints
    if place is None:
        return
    absolute = Path(config.checkpoint.folder).expanduser().is_absolute()  # a relative one can be moved with the run
    target = str(place) if absolute else os.path.relpath(place.resolve(), link.parent.resolve())
    with writing(place):
        place.mkdir(exist_ok=True)
        if not os.path.lexists(place / CLAIM):  # it is there, and of this run, after a creation that was cut off
            (place / CLAIM).symlink_to(RunFolder.of(config).path.resolve())  # of two runs at once, one gets it
    with writing(link):
        if link.is_symlink():
            link.unlink()  # of a creation that was cut off
        elif link.exists():
            link.rmdir()
        link.symlink_to(target)
        sync(link.parent)


def _is_free(place: Path, run: RunFolder) -> bool:
    names = [path.name for path in place.iterdir()] if place.exists() else []
    return not names or (names == [CLAIM] and os.readlink(place / CLAIM) == str(run.path.resolve()))


def check_mounted(checkpoints: Path) -> None:
    """Raises UserError when a run's checkpoints/ is a link to a folder that is not there."""
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise UserError(
            f"this is a link to {os.readlink(checkpoints)}, which is not there",
            where=str(checkpoints),
            why="the checkpoints are on a different disk (checkpoint.folder)",
            remedy="mount it, or make the link point to where they are now",
            status=ExitStatus.NEEDS_PERSON,
        )
