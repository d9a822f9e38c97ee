"""The commit protocol: which names a checkpoints folder may hold, and the one order in which they change.

    .step-00000500.saving-1f3a   being written; nobody reads it
    step-00000500                whole: it got this name by one rename, after everything in it was on the disk
    .step-00000500.replaced      the older one of the same step, while the newer takes its name
    .step-00000500.leaving       may be deleted, if no reader holds a lease on it
    .step-00000500.deleting      no longer whole
    step-00000500.damaged-1      did not match its hashes; kept for a person to look at
    step-00000500.refused-1      every step after it was refused; kept for a person to look at

`recovery` decides what to do with what a process that died at any moment left; each other function does one transition.
Only the run's one writer calls them. Once there has been a whole checkpoint, there is one at every moment.
"""

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from minka.checkpoint.filesystem import FileSystem
from minka.checkpoint.manifest import NAME as MANIFEST
from minka.checkpoint.manifest import STEP_FOLDER

HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(saving|replaced|leaving|deleting)(?:-[0-9a-f]+)?")
WHOLE = ("replaced", "leaving")  # renamed while whole, and nothing in them was deleted since


def step_name(step: int) -> str:
    """Folder name of a checkpoint: sorts by step."""
    return f"step-{step:08d}"


def steps_among(names: Iterable[str]) -> list[int]:
    """Steps of those names that are a checkpoint's, ascending."""
    found = [(name, int(match[1])) for name in names if (match := STEP_FOLDER.fullmatch(name))]
    return sorted(step for name, step in found if name == step_name(step))


def recovery(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """What to do with leftovers: the whole ones with the names that they get back, and those to delete."""
    renames: dict[str, str] = {}
    removals = []
    for match in filter(None, map(HIDDEN.fullmatch, sorted(names))):
        final, state = match.groups()
        if state in WHOLE and final not in names and final not in renames.values():
            renames[match[0]] = final
        else:
            removals.append(match[0])
    return renames, removals


def recover(fs: FileSystem, folder: Path) -> None:
    """Carry out `recovery`. What cannot be deleted now (a file that a reader has open over NFS) does not stop it."""
    renames, removals = recovery(fs.listdir(folder))
    for old, new in renames.items():
        fs.rename(folder / old, folder / new)
        fs.sync(folder)
    for name in removals:
        with suppress(OSError):
            _delete(fs, folder / name)


def commit(fs: FileSystem, written: Path, final: Path, manifest: bytes) -> None:
    """Write the manifest into `written` and make it the checkpoint `final`. An older one of that step is replaced."""
    fs.write(written / MANIFEST, [memoryview(manifest)])
    fs.sync(written)  # the names in it must be on the disk before its own name is
    older = final.with_name(f".{final.name}.replaced")
    replaces = final.name in fs.listdir(final.parent)
    try:
        if replaces:
            fs.rename(final, older)
            fs.sync(final.parent)  # `recovery` restores it only if its hidden name can be found
        fs.rename(written, final)
    except OSError:
        if replaces:
            with suppress(OSError):  # then `recovery` renames it; the first error is the one to report
                fs.rename(older, final)
        raise
    fs.sync(final.parent)
    if replaces:
        with suppress(OSError):  # the new one is committed; the next save deletes this
            _delete(fs, older)


def delete_unless_leased(fs: FileSystem, path: Path, is_leased: Callable[[], bool]) -> bool:
    """Delete a checkpoint unless a reader holds a lease on it. Returns whether it was deleted.

    A reader first writes its lease and then looks for the checkpoint. Here first the name is taken away and then the
    leases are read. So whichever comes second sees the other.
    """
    if is_leased():
        return False
    leaving = path.with_name(f".{path.name}.leaving")
    held = True  # until the leases have been read
    fs.rename(path, leaving)
    try:
        fs.sync(path.parent)
        held = is_leased()
    finally:
        if held:
            fs.rename(leaving, path)
            fs.sync(path.parent)
    if not held:
        _delete(fs, leaving)
    return not held


def set_aside(fs: FileSystem, path: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, so that it is kept for a person and never read again. Returns its new path."""
    taken = set(fs.listdir(path.parent))
    number = next(n for n in range(1, len(taken) + 2) if f"{path.name}.{why}-{n}" not in taken)
    aside = path.with_name(f"{path.name}.{why}-{number}")
    fs.rename(path, aside)
    fs.sync(path.parent)
    return aside


def _delete(fs: FileSystem, path: Path) -> None:
    """Delete a hidden folder. One that `recovery` would take for whole gets a different name first."""
    match = HIDDEN.fullmatch(path.name)
    if match and match[2] in WHOLE:
        deleting = path.with_name(f".{match[1]}.deleting")
        fs.rmtree(deleting)
        fs.rename(path, deleting)
        fs.sync(path.parent)
        path = deleting
    fs.rmtree(path)
