"""The commit protocol of checkpoints: which names a folder may hold, and the one order in which they change.

    .step-00000500.saving-1f3a   being written; nobody has it
    step-00000500                whole: it got this name by one rename, after everything in it was on the disk
    .step-00000500.replaced      the older one of the same step, while the newer takes its name
    .step-00000500.leaving       may be deleted, if no reader holds a lease on it
    .step-00000500.deleting      no longer whole
    step-00000500.damaged-1      failed its hashes; kept for a person to look at

`mend` decides what becomes of a folder in which a process died at any moment; the rest does one transition each. Only
the run's one writer calls them. At every moment there is a whole checkpoint once there has been one.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minka.checkpoint.filesystem import Disk
from minka.checkpoint.manifest import NAME as MANIFEST

FINAL = re.compile(r"step-([0-9]{8,})")
HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(saving|replaced|leaving|deleting)(?:-[0-9a-f]+)?")


class Rename(NamedTuple):
    """Give `old` the name `new`."""

    old: str
    new: str


class Remove(NamedTuple):
    """Delete `name`."""

    name: str


def step_name(step: int) -> str:
    """Folder name of a checkpoint: sorts by step."""
    return f"step-{step:08d}"


def steps_among(names: Iterable[str]) -> list[int]:
    """Steps of all names that a checkpoint has, ascending."""
    found = [(name, int(match[1])) for name in names if (match := FINAL.fullmatch(name))]
    return sorted(step for name, step in found if name == step_name(step))


def mend(names: Iterable[str]) -> list[Rename | Remove]:
    """What to do about leftovers. First whole ones get their name back, then what is of no use goes."""
    there = set(names)
    back: list[Rename | Remove] = []
    gone: list[Rename | Remove] = []
    for name in sorted(there):
        match = HIDDEN.fullmatch(name)
        if not match:
            continue
        final, state = match.groups()
        whole = state in ("replaced", "leaving")  # these two were renamed whole, and nothing of them was deleted since
        if whole and final not in there:
            back.append(Rename(name, final))
            there.add(final)
        else:
            gone.append(Remove(name))
    return back + gone


def recover(disk: Disk, folder: Path) -> None:
    """Carry out `mend`. What cannot be deleted now (a reader's open file on a network) is no reason not to save."""
    for action in mend(disk.names(folder)):
        if isinstance(action, Rename):
            disk.rename(folder / action.old, folder / action.new)
            disk.sync(folder)
        else:
            with suppress(OSError):
                _delete(disk, folder / action.name)


def begin(disk: Disk, folder: Path, step: int, attempt: int) -> Path:
    """A fresh folder to write into, once the leftovers of earlier attempts are gone."""
    recover(disk, folder)
    path = folder / f".{step_name(step)}.saving-{attempt:x}"
    disk.make(path)
    return path


def commit(disk: Disk, written: Path, final: Path, manifest: bytes) -> None:
    """Write the manifest into `written` and make it the checkpoint `final`. An older one of that step is replaced."""
    disk.write(written / MANIFEST, [memoryview(manifest)])
    disk.sync(written)  # its names must be on the disk before its own name is
    older = final.with_name(f".{final.name}.replaced")
    replaces = final.name in disk.names(final.parent)
    try:
        if replaces:
            disk.rename(final, older)
            disk.sync(final.parent)  # `mend` gives it back only if its new name is there to be found
        disk.rename(written, final)
    except OSError:
        if replaces:
            with suppress(OSError):  # then `mend` gives it back; what went wrong first is what is told
                disk.rename(older, final)
        raise
    disk.sync(final.parent)
    if replaces:
        with suppress(OSError):  # it is committed; the next save clears this away
            _delete(disk, older)


def discard(disk: Disk, written: Path) -> None:
    """An attempt that failed."""
    disk.remove(written)


def retire(disk: Disk, path: Path, leased: Callable[[], bool]) -> bool:
    """Delete a checkpoint unless a reader holds it; whether it is gone.

    A reader writes its lease first and looks for the checkpoint then; here the name goes first and the leases are read
    then. Whichever comes second sees the other.
    """
    if leased():
        return False
    leaving = path.with_name(f".{path.name}.leaving")
    held = True
    disk.rename(path, leaving)
    try:
        disk.sync(path.parent)
        held = leased()
    finally:
        if held:  # or it cannot be known
            disk.rename(leaving, path)
    if held:
        disk.sync(path.parent)
        return False
    deleting = path.with_name(f".{path.name}.deleting")
    disk.remove(deleting)
    disk.rename(leaving, deleting)
    disk.sync(path.parent)  # nothing is deleted under a name that `mend` would give back
    disk.remove(deleting)
    return True


def set_aside(disk: Disk, path: Path) -> Path:
    """Take its name from a damaged checkpoint, and keep it for a person."""
    taken = set(disk.names(path.parent))
    number = next(n for n in range(1, len(taken) + 2) if f"{path.name}.damaged-{n}" not in taken)
    aside = path.with_name(f"{path.name}.damaged-{number}")
    disk.rename(path, aside)
    disk.sync(path.parent)
    return aside


def _delete(disk: Disk, path: Path) -> None:
    """Under a name first that says so, lest a crash half way leave a part under a name that means a whole."""
    match = HIDDEN.fullmatch(path.name)
    if match and match[2] in ("replaced", "leaving"):
        deleting = path.with_name(f".{match[1]}.deleting")
        disk.remove(deleting)
        disk.rename(path, deleting)
        disk.sync(path.parent)
        path = deleting
    disk.remove(path)
