"""checkpoint.folder: a run's checkpoints on another disk. The run's checkpoints/ is then a link to a folder there."""

import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from shlex import quote

from minka.plan.atomic import sync, writing
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.read_file import reading
from minka.plan.run_folder import RunFolder

CLAIM = ".run"  # in the folder there: a link to the run that made it


def find_place(config: RunConfig, *, again: bool = False) -> Path | None:
    """The folder in checkpoint.folder for the checkpoints of a run that has none; None where that is not set.

    `again`: for those to come of a run that restarts; they are put where its others are now, which may have been moved.
    Raises UserError when checkpoint.folder is missing, or something is in that place.
    """
    if not config.checkpoint.folder:
        return None
    run = RunFolder.of(config)
    old = sorted(run.path.glob("checkpoints.old-*"), key=lambda path: path.stat(follow_symlinks=False).st_ctime_ns)
    before = [*old, *([run.checkpoints] if again else [])]  # links to the folders there
    disk = run.bases()[0] / Path(config.checkpoint.folder).expanduser()
    if before and before[-1].is_symlink() and before[-1].is_dir():
        disk = before[-1].resolve().parent
    place = disk / run.path.absolute().name
    problem, remedy = f"there is no folder {disk}", "make it, or mount its disk"
    with reading(place):
        if before:
            places = (place.with_name(f"{place.name}.{n}") for n in count(1))
            place = next(other for other in places if not other.exists() or _is_free(other, run))
        if disk.is_dir() and _is_free(place, run):
            return place
        if disk.is_dir():
            problem = f"{place} is not empty, and may hold the checkpoints of a different run"
            remedy = f"choose a different run.name or checkpoint.folder, move it away, or link {run.checkpoints} to it"
    raise UserError(problem, where="checkpoint.folder", remedy=remedy)


def claim_place(config: RunConfig, *, again: bool = False) -> Path | None:
    """`find_place`, made and claimed for the run; for its one writer. Raises UserError."""
    place = find_place(config, again=again)
    if place is not None:
        with writing(place):
            place.mkdir(exist_ok=True)
            with suppress(FileExistsError):  # of two runs at once, one gets it
                (place / CLAIM).symlink_to(RunFolder.of(config).path.resolve())
        if not _is_free(place, RunFolder.of(config)):
            return claim_place(config, again=again)
    return place


def link_place(config: RunConfig, place: Path | None) -> None:
    """Make checkpoints/ of a run that has none a link to what `claim_place` gave; for its one writer."""
    link = RunFolder.of(config).checkpoints
    if place is None:
        return
    absolute = Path(config.checkpoint.folder).expanduser().is_absolute()  # a relative one can be moved with the run
    target = str(place) if absolute else os.path.relpath(place.resolve(), link.parent.resolve())
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


def renew_claim(run: RunFolder) -> None:
    """Name a run that has been moved as the one that uses its place, after `check_place`; for its one writer."""
    claim = run.checkpoints / CLAIM
    if run.checkpoints.is_symlink() and run.checkpoints.is_dir() and not _names(claim, run):
        with writing(claim):
            claim.unlink(missing_ok=True)
            claim.symlink_to(run.path.resolve())


def _names(claim: Path, run: RunFolder) -> bool:
    with suppress(OSError):
        return claim.is_symlink() and claim.samefile(run.path)
    return False


def check_place(run: RunFolder) -> None:
    """Raises UserError when a run's checkpoints/ is a link to a folder that is not there, or that a different run uses.

    So does the copy of a run that was made with the link in it.
    """
    check_mounted(run.checkpoints)
    claim = run.checkpoints / CLAIM
    if not run.checkpoints.is_symlink() or not claim.is_symlink() or _names(claim, run):
        return
    owner = RunFolder(Path(os.readlink(claim)))
    here, theirs = (quote(str(folder.checkpoints)) for folder in (run, owner))
    with suppress(OSError):  # it is gone: the run was moved
        if owner.exists() and owner.checkpoints.samefile(run.checkpoints):
            raise UserError(
                f"these are the checkpoints of {owner.path}, which trains with them",
                where=str(run.checkpoints),
                why="this folder seems to be a copy of that run, and the link was copied",
                remedy=f"give it copies in place of the link: rm {here} && cp -r {theirs}/. {here}",
                status=ExitStatus.NEEDS_PERSON,
            )


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
