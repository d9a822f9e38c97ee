"""The state of a run: what its folder says about it, read once at a start, checked by resume_rules.py, handed down.

The ledger is read from its end, and only as far back as its last start and its last save.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Self

from pydantic import BaseModel, ValidationError

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import RETURNS, STEP, lines_from_end, parse_event
from minka.plan.load_config import describe_problems, from_json
from minka.plan.run_folder import RunFolder

STEP_LINE = re.compile(STEP + rb', "time": [^,]+, "step": (\d+), "tokens": (\d+)')


class Position(NamedTuple):
    """How far a run has come: steps begun, samples and tokens consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Position":
        """From the state in a checkpoint's manifest. Raises KeyError, TypeError or ValueError where it has none."""
        return cls(*(int(state[name]) for name in cls._fields))


class Header(NamedTuple):
    """What a start needs of a checkpoint's manifest. `number` grows with every save of the run."""

    number: int
    position: Position


class RunState(BaseModel, frozen=True, extra="forbid"):
    """A run as its folder describes it; plain JSON, so that it can be handed to other processes."""

    begun: bool = False  # it has a ledger or a checkpoint; before that, creating it again loses nothing
    started: bool = False  # it has been trained since it last restarted from its beginning
    started_with: RunConfig | None = None  # the configuration of its last start; version 1 recorded none
    unreadable_start: str = ""  # why that configuration cannot be read
    in_file: RunConfig | None = None  # run.toml as it is now; None where it is not valid
    finished: bool = False  # exit_reason.json says so
    checkpoints: tuple[int, ...] = ()  # steps of the checkpoint folders, whole or damaged, ascending
    position: Position | None = None  # of the newest checkpoint with a readable manifest
    last_save: int | None = None  # step of the last save that no later return to an earlier step has made void
    evaluated: bool = False  # the evaluation at `position` has been recorded
    tokens_before: int = 0  # tokens consumed before the last step of `position`
    ledger_bytes: int = 0

    @property
    def config(self) -> RunConfig | None:
        """The configuration it was last trained with, as far as that is known. A run.toml edited since is ignored."""
        return self.started_with or self.in_file

    @property
    def newest(self) -> int | None:
        """Step of the checkpoint to restore, where the ledger alone says which one is the newest."""
        return self.last_save if self.position and self.position.step == self.last_save else None

    def restarted(self) -> Self:
        """The state after `--from-scratch` has moved the checkpoints away."""
        gone = {"checkpoints": (), "position": None, "last_save": None}
        return self.model_copy(update={"started": False, "finished": False, **gone})

    def is_current(self, folder: RunFolder, checkpoints: Sequence[int]) -> bool:
        """Whether nobody has trained the run since this was read: neither ledger nor checkpoints have changed."""
        return self.ledger_bytes == _size(folder) and self.checkpoints == tuple(checkpoints)


def read_run_state(
    folder: RunFolder, checkpoints: Sequence[int], read_header: Callable[[int], Header | None]
) -> RunState:
    """Read the state of the run in `folder`. Raises UserError when run.toml is needed and not valid.

    `checkpoints` are the steps of its checkpoint folders. `read_header` gives the header of one of them, or None where
    its manifest cannot be read; normally it is called once.
    """
    if not folder.begun():
        return RunState(finished=folder.finished(), checkpoints=tuple(checkpoints), ledger_bytes=_size(folder))
    size = _size(folder)  # before the reading: what is appended meanwhile makes the state outdated
    tail = _Tail(checkpoints)
    if size:
        with folder.ledger_file.open("rb") as ledger:
            tail.read(ledger)
    config, problem = tail.configuration(str(folder.ledger_file))
    try:
        in_file = folder.config()
    except UserError:
        if config is None and not problem:
            raise
        in_file = None  # training will write it again
    position = _newest_position(checkpoints, tail.last_save, read_header)
    step = position.step if position else 0
    return RunState(
        begun=True,
        started=tail.started,
        started_with=config,
        unreadable_start=problem,
        in_file=in_file,
        finished=folder.finished(),
        checkpoints=tuple(checkpoints),
        position=position,
        last_save=tail.last_save,
        # An evaluation comes before the next step, so a checkpoint with a later save after it was evaluated.
        evaluated=step in tail.evaluated or step < (tail.last_save or 0),
        tokens_before=tail.tokens.get(step - 1, 0),
        ledger_bytes=size,
    )


class _Tail:
    """The end of a ledger, read backwards."""

    def __init__(self, checkpoints: Sequence[int]) -> None:
        self._wanted = {step - 1 for step in checkpoints}
        self._start: tuple[int, dict[str, Any]] | None = None
        self._bound = 2**63  # the lowest step that a later event has returned to
        self._restarted = self._start_counts = False
        self.started = False
        self.last_save: int | None = None
        self.evaluated: set[int] = set()
        self.tokens: dict[int, int] = {}  # consumed after the step before each checkpoint

    def read(self, ledger: BinaryIO) -> None:
        """Read until the last save, a step before it, and the last start are known."""
        end = None
        for at, line in lines_from_end(ledger) if self._wanted else ():
            end = at
            if line.startswith(STEP):
                if self._step(line):
                    break  # everything about the last save has been read
            else:
                self._event(at, line)
            if self._restarted:
                break
        for at, line in () if self._complete() else lines_from_end(ledger, end, skip=STEP):
            self._event(at, line)
            if self._complete():
                break

    def _complete(self) -> bool:
        return self._start is not None and (self._restarted or self.last_save is not None)

    def configuration(self, ledger: str) -> tuple[RunConfig | None, str]:
        """The configuration of the last start, if it has one; or why it cannot be read."""
        at, event = self._start or (0, {})
        if "config" not in event:
            return None, ""
        try:
            return from_json(json.dumps(event["config"])), ""
        except ValidationError as error:
            said = f"{ledger}: the start event at byte {at:,} cannot be read: {describe_problems(error)}"
            return None, said if self._start_counts else ""

    def _step(self, line: bytes) -> bool:
        """Note the tokens after a step; return whether the last save came after it."""
        match = STEP_LINE.match(line)
        if not match:
            return False
        step = int(match[1])
        if step in self._wanted and step <= self._bound:
            self.tokens.setdefault(step, int(match[2]))
        return self.last_save is not None and step < self.last_save

    def _event(self, at: int, line: bytes) -> None:
        event = parse_event(line)
        if event is None:
            return
        kind, step = event["event"], event["step"]
        if kind == "start" and self._start is None:
            self._start, self._start_counts = (at, event), not self._restarted
        if self._restarted:
            return
        self.started |= kind == "start"
        if kind == "save" and step <= self._bound and self.last_save is None:
            self.last_save = step
        if kind == "eval" and step <= self._bound:
            self.evaluated.add(step)
        if kind in RETURNS:
            self._bound = min(self._bound, step)
            self._restarted = kind == "restart"


def _newest_position(
    checkpoints: Sequence[int], last_save: int | None, read_header: Callable[[int], Header | None]
) -> Position | None:
    # The saves that still count ascend in step, so the last of them is the newest when no checkpoint is beyond it.
    if checkpoints and last_save == max(checkpoints):
        header = read_header(last_save)
        if header:
            return header.position
    # A crash between a save and its event, or checkpoints of an abandoned lineage: their numbers decide.
    headers = [header for step in checkpoints if (header := read_header(step))]
    return max(headers, key=lambda header: (header.number, header.position.step)).position if headers else None


def _size(folder: RunFolder) -> int:
    return folder.ledger_file.stat().st_size if folder.ledger_file.exists() else 0
