"""The first tensors and state of a session: from the run's own checkpoint, from its parent, or from its seed."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from minka.checkpoint.commit import step_name
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore, restore_from
from minka.model.hub_folder import read_tensors
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.resume_rules import changes, decides_rate, explain_model_changes
from minka.plan.run_state import RunState
from minka.plan.tensor_name import tensor_name
from minka.train.parent_run import Parent, begins_at, changes_of, pinned_parent
from minka.train.recorder import Recorder
from minka.train.schedule import learning_rate
from minka.train.state import State, random_state

# Relative difference of two rates; near zero, of the peak. The schedule is one function up to the C library's cosine.
CLOSE = 1e-9


def restore_or_init(engine: Engine, record: Recorder, mesh: Mesh, before: RunState) -> State:
    """Fill the engine's tensors and return the state to train from. Collective. Raises UserError on every rank.

    `before` is the state of the run when it was started; only rank 0's counts.
    """
    damaged: list[dict[str, str]] = []
    random = random_state()
    saved = restore(
        record.folder.checkpoints,
        {**engine.tensors(), **random},
        mesh,
        lambda path, reason: damaged.append({"path": str(path), "reason": reason}),
        alive=lambda: record.supervisor.heartbeat(0),
        say=record.console.say,
        newest=before.newest,
    )
    if saved is None:
        return _init(engine, record, mesh, before)
    engine.after_restore()
    torch.set_rng_state(random["rng.torch"].local)
    state = State.from_json(saved)
    record.last_saved = record.accepted = state
    for one in damaged:
        record.event("fallback", state, **one)
        record.console.say(f"{one['path']} is damaged ({one['reason']}); using the checkpoint before it")
    if before.last_save is not None and before.last_save != state.step:
        lost = record.folder.checkpoints / step_name(before.last_save)
        if not lost.exists() and str(lost) not in [one["path"] for one in damaged]:
            refused = any(lost.parent.glob(f"{lost.name}.refused-*"))
            reason = "it was saved, and " + ("every step after it was refused" if refused else "is missing")
            record.event("fallback", state, path=str(lost), reason=reason)
            record.console.say(f"{lost}: {reason}; using step {state.step}")
    try:
        note = check_rate(saved, before.config, record.config, state, str(record.folder.path))
    except UserError as error:
        record.event("refuse", state, reason=error.what)
        raise
    record.event("restore", state, reason="the run is resumed")
    record.console.say(f"resuming from step {state.step}")
    if note:
        record.console.say(note)
    return state


def check_rate(saved: Mapping[str, Any], started: RunConfig | None, config: RunConfig, state: State, where: str) -> str:
    """Compare the rate of the next step with the checkpoint's. Return a line with both when a setting changed it.

    `started` is the last configuration of the run, for checkpoints of format 1, which have none. Raises UserError when
    the rates differ though no setting did.
    """
    rate = learning_rate(config, state.step, state.tokens)
    old = RunConfig.model_validate_json(json.dumps(saved["config"])) if "config" in saved else started
    if old is not None and decides_rate(changes(old, config)):
        was = saved.get("learning_rate", learning_rate(old, state.step, state.tokens))
        both = f"{was:.4g} with the saved settings, {rate:.4g} with the new ones"
        return f"learning rate of step {state.step + 1}: {both}"
    if "learning_rate" in saved and not math.isclose(
        rate, saved["learning_rate"], rel_tol=CLOSE, abs_tol=CLOSE * config.optimizer.learning_rate
    ):
        version = (saved.get("versions") or {}).get("minka", "version unknown")
        what = f"the learning rate of step {state.step + 1} would be {rate:.6g}"
        fork = f"run.name=NEW run.start_from={config.run.name}"
        raise UserError(
            f"{what}, and the checkpoint was written for {saved['learning_rate']:.6g}",
            where=where,
            why="no setting has changed it: this version computes a different schedule, or the checkpoint is wrong",
            remedy=f"resume with the minka that wrote it ({version}), or start a new run from it ({fork})",
            status=ExitStatus.NEEDS_PERSON,
        )
    return ""


def _init(engine: Engine, record: Recorder, mesh: Mesh, before: RunState) -> State:
    """Begin from the parent's tensors, or from the initial weights that the engine already has."""
    with agreed(mesh):
        parent = pinned_parent(record.folder)
    state = record.accepted = State()
    if parent:
        position, origin = begins_at(parent, record.config, record.store.hash)
        state = record.accepted = State(*position)
        record.last_saved = replace(state, step=-1)  # it is not saved yet, and its token milestones are its parent's
        beat, say = (lambda: record.supervisor.heartbeat(0)), record.console.say
        load_parent(parent, engine, record.config.run.start_with, mesh, beat, say)
        record.console.say(origin)
        for line in explain_model_changes(changes_of(parent, record.config)):
            record.console.say(line)
        if parent.learning_rate is not None and state.step:
            rate = learning_rate(record.config, state.step, state.tokens)
            both = f"{parent.learning_rate:.4g} there, {rate:.4g} here"
            record.console.say(f"learning rate of step {state.step + 1}: {both}")
    if before.started:
        source = parent.name if parent else "its initial weights"
        reason = f"the run ended before its first checkpoint, and restarts from {source}"
        record.event("restart", state, reason=reason)
        record.console.say(reason)
    return state


def load_parent(
    parent: Parent,
    engine: Engine,
    start_with: str,
    mesh: Mesh,
    alive: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Read the parent's weights, or everything, into the engine's tensors. Collective; leased while it is read."""
    tensors = engine.tensors()
    if start_with == "weights":
        tensors = {name: piece for name, piece in tensors.items() if name.startswith("model.")}
    with ExitStack() as stack:
        if parent.checkpoint is None:
            with agreed(mesh):
                _load_hub_folder(parent, tensors)
        else:
            with agreed(mesh):  # the lease, before any rank reads
                if mesh.is_first:
                    stack.enter_context(leased(parent.folder, parent.checkpoint))
            restore_from(parent.checkpoint, tensors, mesh, alive=alive, say=say)
        engine.after_restore()
        mesh.barrier()


@contextmanager
def agreed(mesh: Mesh) -> Iterator[None]:
    """End every rank when the block raises a UserError on one: with it there, with rank 0's exit status elsewhere."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    status = int(problem.status) if problem and mesh.is_first else 0
    status, failures = mesh.sum_on_host([status, problem is not None])
    if failures:
        raise problem or SystemExit(status or int(ExitStatus.REFUSED))


def _load_hub_folder(parent: Parent, tensors: Mapping[str, Piece]) -> None:
    mine: dict[str, list[Piece]] = {}
    for key, piece in tensors.items():
        mine.setdefault(tensor_name(key), []).append(piece)
    with torch.no_grad():
        for name, whole in read_tensors(parent.folder, parent.model):
            for piece in mine[f"model.{name}"]:
                box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.local.shape, strict=True))
                piece.local.copy_(whole[box])
