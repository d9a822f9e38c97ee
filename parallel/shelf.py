"""The checkpoints folder of a run: which checkpoints are there, which one is meant, and which may go."""

import re
import shutil
from pathlib import Path

from minka.parallel.manifest import NAME
from minka.plan.errors import UserError


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    paths = (folder / step_name(step) for step in sorted(steps_of(folder)))
    return [path for path in paths if (path / NAME).is_file()]


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
    return chosen[-1]


def run_and_step(given: str) -> tuple[str, str]:
    """RUN or RUN@STEP as (run, step or ""); the path of a run's run.toml means the run."""
    path = Path(given)
    name, _, step = path.name.partition("@")
    return str(path.parent if name == "run.toml" else path.parent / name), step


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` written last and give those that are gone. Never raises OSError: what must stay stays.

    Written last, not of the highest step: after a fall-back, damaged ones may lie above those that are written now.
    Each loses its name first, so half a deletion leaves no half checkpoint.
    """
    gone: list[Path] = []
    try:
        old = sorted(checkpoints(folder), key=lambda path: (path / NAME).stat().st_mtime_ns)[:-keep]
    except OSError:
        return gone
    for path in old:
        grave = grave_of(path)
        shutil.rmtree(grave, ignore_errors=True)  # of a deletion that was cut off
        try:
            path.rename(grave)
        except OSError:
            continue
        shutil.rmtree(grave, ignore_errors=True)
        gone.append(path)
    return gone


def step_name(step: int) -> str:
    """Folder name of a checkpoint: sorts by step."""
    return f"step-{step:08d}"


def steps_of(folder: Path) -> list[int]:
    """Steps of all folders with a checkpoint's name, whole or not."""
    named = (re.fullmatch(r"step-([0-9]{8,})", path.name) for path in folder.glob("step-*") if path.is_dir())
    return [int(match[1]) for match in named if match]


def grave_of(path: Path) -> Path:
    """The name of a checkpoint that is being deleted."""
    return path.with_name(f".{path.name}.deleting")
