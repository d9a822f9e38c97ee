"""Whether a run may begin or go on as it is asked to: what `minka train` and its dry run look at. Imports no torch."""

from collections.abc import Mapping
from typing import NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.resume_rules import LENGTH, changes, check_resume
from minka.plan.run_folder import RunFolder
from minka.train.parent_run import Parent, Position, check_parent, check_tokenizer, find_parent
from minka.train.standing import check_goes_on, standing


class Outlook(NamedTuple):
    """What would become of the run."""

    begun: bool
    over: bool  # finished, and nothing that was given makes it longer
    place: Position | None  # of the checkpoint that it goes on from
    parent: Parent | None  # of a new run
    changed: Mapping[str, object]  # against the run as it was last started

    @property
    def step(self) -> int:
        """Of the checkpoint that it goes on from; 0 for its beginning."""
        return self.place.step if self.place else 0

    @property
    def ignored(self) -> list[str]:
        """What was given and, without more steps, changes nothing."""
        return [key for key in self.changed if key not in LENGTH]

    def told(self, *, from_scratch: bool) -> str:
        """For people, in one line."""
        if from_scratch:
            return "begins again at step 0; the checkpoints that are there would be moved aside"
        if self.over:
            return f"is finished, at step {self.step:,}" if self.place else "is finished"
        if self.place:
            return f"goes on from step {self.step:,}"
        if self.begun:
            return "goes on from its beginning: no checkpoint of it can be read"
        return f"begins from {self.parent.name}" if self.parent else "begins from new weights"


def look(config: RunConfig, *, from_scratch: bool) -> Outlook:
    """Raises UserError for a run that may not begin, or not go on like this."""
    folder = RunFolder.of(config)
    begun = folder.begun()
    changed = folder.changes(config) if begun else {}
    parent = None
    if config.run.start_from and (not begun or "run.start_from" in changed):  # then it may be the run itself
        parent = find_parent(config)
        if parent and not begun:
            check_parent(parent, config)
            check_tokenizer(parent, config)
    if not begun:
        return Outlook(begun, False, None, parent, changed)
    check_resume(changed, config.run.name, str(folder.path), edited=_edited(folder), forked=bool(config.run.start_from))
    if from_scratch:
        return Outlook(begun, False, None, None, changed)
    over, longer = folder.finished(), any(key in changed for key in LENGTH)
    if not over or longer:
        check_goes_on(folder, config)
    place = standing(folder)
    if over and longer:  # where no checkpoint can be read, the ranks say what is wrong with them
        over = place is not None and config.finished(place.step, place.tokens)
    return Outlook(begun, over, place, None, changed)


def _edited(folder: RunFolder) -> Mapping[str, object]:
    """What a person has changed in run.toml since the run was last started."""
    started = folder.history().config
    try:
        return changes(started, folder.config()) if started else {}
    except UserError:
        return {}  # it is no run any more; training writes it anew
