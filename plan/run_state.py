"""The state of a run: what its folder says about it, read once at a start, checked by resume_rules.py, handed down."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple, Self

from pydantic import BaseModel, ValidationError

from minka.plan.config import RunConfig
from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError
from minka.plan.ledger import RETURNS, STEP, lines_from_end, parse_event
from minka.plan.load_config import describe_problems
from minka.plan.read_file import reading
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
    newest: int | None = None  # step of that checkpoint; None where a manifest that decides it cannot be read
    last_save: int | None = None  # step of the last save that no later return to an earlier step has made void
    evaluated: bool = False  # the evaluation at `position` has been recorded
    tokens_before: int = 0  # tokens consumed before the last step of `position`
    ledger_bytes: int = 0

    @property
    def config(self) -> RunConfig | None:
        """The configuration it was last trained with, as far as that is known. A run.toml edited since is ignored."""
        return self.started_with or self.in_file

    def restarted(self) -> Self:
        """The state after `--from-scratch` has moved the checkpoints away."""
        gone = {"checkpoints": (), "position": None, "newest": None, "last_save": None}
        return self.model_copy(update={"started": False, "finished": False, **gone})

    def returned(self, position: Position) -> Self:
        """The state after a return to the checkpoint at `position` (RUN@STEP)."""
        there = {"position": position, "newest": position.step, "last_save": position.step}
        return self.model_copy(update={"finished": self.finished and position == self.position, **there})

    def is_current(self, folder: RunFolder, checkpoints: Sequence[int]) -> bool:
        """Whether nobody has trained the run since this was read: neither ledger nor checkpoints have changed."""
        return self.ledger_bytes == folder.ledger_bytes() and self.checkpoints == tuple(checkpoints)


def read_run_state(
    folder: RunFolder, checkpoints: Sequence[int], read_header: Callable[[int], tuple[int, Position] | None]
) -> RunState:
    """Read the state of the run in `folder`. Raises UserError when run.toml is needed and not valid.

    `checkpoints` are the steps of its checkpoint folders. `read_header` gives the number of one of them, which grows
    with every save of the run, and its position; None where its manifest cannot be read. Normally it is called once.
    """
    size = folder.ledger_bytes()  # before the reading: what is appended meanwhile makes the state outdated
    state = RunState(finished=folder.finished(), checkpoints=tuple(checkpoints), ledger_bytes=size)
    if not folder.begun():
        return state
    with reading(folder.ledger_file), _ledger(folder) as ledger:
        recent = _Recent(ledger)
        position, newest = _newest(checkpoints, recent.last_save, read_header)
        step = position.step if position else 0
        tokens_before = _tokens_after(ledger, step - 1) if step > 1 else 0
    config, problem = recent.configuration(str(folder.ledger_file))
    try:
        in_file = folder.config()
    except UserError:
        if config is None and not problem:
            raise
        in_file = None  # training will write it again
    found = {
        "begun": True,
        "started": recent.started,
        "started_with": config,
        "unreadable_start": problem,
        "in_file": in_file,
        "position": position,
        "newest": newest,
        "last_save": recent.last_save,
        # An evaluation comes before the next step, so a checkpoint with a later save after it was evaluated.
        "evaluated": step in recent.evaluated or step < (recent.last_save or 0),
        "tokens_before": tokens_before,
    }
    return state.model_copy(update=found)


def trained_model(folder: RunFolder) -> ModelSection:
    """The model of run.toml, which must be that of the run's last start, or its weights mean something else.

    Raises UserError.
    """
    model = folder.config().model
    with reading(folder.ledger_file), _ledger(folder) as ledger:
        started_with, _ = _Recent(ledger).configuration(str(folder.ledger_file))
    if started_with and started_with.model != model:
        before, now = started_with.model.model_dump(), model.model_dump()
        changed = [
            f"model.{key} = {now[key]!r} (trained with {before[key]!r})" for key in now if now[key] != before[key]
        ]
        what = f"this is not the model that the run was trained as: {', '.join(changed)}"
        why, remedy = f"the last start event of {folder.ledger_file} has a different one", "set it back in this file"
        raise UserError(what, where=str(folder.config_file), why=why, remedy=remedy)
    return model


def _ledger(folder: RunFolder) -> BinaryIO:
    return folder.ledger_file.open("rb") if folder.ledger_bytes() else BytesIO()


class _Recent:
    """The events back to the last start and the last save of a ledger, which is read from its end."""

    def __init__(self, ledger: BinaryIO) -> None:
        self.started = False
        self.last_save: int | None = None
        self.evaluated: set[int] = set()
        self._start: tuple[int, dict[str, Any]] | None = None
        self._start_counts = restarted = False
        bound = 2**63  # the lowest step that a later event has returned to
        for at, line in lines_from_end(ledger, skip=STEP):
            event = parse_event(line) or _damaged_start(line)
            if event is None:
                continue
            kind, step = event["event"], event["step"]
            if kind == "start" and self._start is None:
                self._start, self._start_counts = (at, event), not restarted
            if not restarted:
                self.started |= kind == "start"
                if kind == "save" and step <= bound and self.last_save is None:
                    self.last_save = step
                if kind == "eval" and step <= bound:
                    self.evaluated.add(step)
                if kind in RETURNS:
                    bound, restarted = min(bound, step), kind == "restart"
            if self._start and (restarted or (self.last_save is not None and step < self.last_save)):
                break  # an evaluation may have been recorded before its save

    def configuration(self, ledger: str) -> tuple[RunConfig | None, str]:
        """The configuration of the last start, if it has one; or why it cannot be read."""
        at, event = self._start or (0, {})
        if "config" not in event:
            return None, ""
        try:
            return RunConfig.model_validate_json(json.dumps(event["config"])), ""
        except ValidationError as error:
            reason = describe_problems(error) if event["config"] else "the line is damaged"
            said = f"{ledger}: the start event at byte {at:,} cannot be read: {reason}"
            return None, said if self._start_counts else ""


def _damaged_start(line: bytes) -> dict[str, Any] | None:
    """A start event without its configuration, if the line was one. One that a crash cut off trained nothing."""
    is_start = line.startswith(b'{"event": "start"') or b'"config": {"format":' in line
    return {"event": "start", "step": 0, "config": None} if is_start and line.endswith(b"}") else None


def _tokens_after(ledger: BinaryIO, step: int) -> int:
    """Tokens consumed after `step`; 0 where the run has returned to an earlier one, or the line is not there."""
    for _, line in lines_from_end(ledger):
        match = STEP_LINE.match(line)
        if match and int(match[1]) <= step:
            return int(match[2]) if int(match[1]) == step else 0
    return 0


def _newest(
    checkpoints: Sequence[int], last_save: int | None, read_header: Callable[[int], tuple[int, Position] | None]
) -> tuple[Position | None, int | None]:
    """The position of the newest checkpoint, and its step where that is certain."""
    # The saves that still count ascend in step. Beyond the last of them are checkpoints of an abandoned lineage, or one
    # whose event was lost in a crash: their numbers decide.
    last = last_save if last_save in checkpoints else None
    deciding = [step for step in checkpoints if last is None or step >= last]
    headers = {step: read_header(step) for step in deciding}
    certain = None not in headers.values()
    if not certain:
        headers |= {step: read_header(step) for step in checkpoints if step not in headers}
    _, position = max(filter(None, headers.values()), default=(0, None))
    return position, position.step if position and certain else None
