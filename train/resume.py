"""How a run comes to its first step: from its own checkpoint, from its parent's, or from nothing, and never unsaid."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from minka.checkpoint.commit import step_name
from minka.checkpoint.reader_lease import leased
from minka.checkpoint.restore import restore, restore_from
from minka.model.hub_folder import read_tensors
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh
from minka.parallel.pieces import Piece, tensor_name
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import RETURNS, read_ledger
from minka.plan.load_config import from_json
from minka.plan.resume_rules import changes, decides_rate
from minka.plan.run_folder import RunFolder
from minka.train.parent_run import Parent, begins_at, pinned_parent
from minka.train.recorder import Recorder
from minka.train.schedule import learning_rate
from minka.train.state import State, randomness

# Of the rate, or near zero of the peak: the schedule is the same function everywhere, up to the C library's cosine.
CLOSE = 1e-9


def begin(engine: Engine, record: Recorder, mesh: Mesh) -> State:
    """Fill the engine's tensors and give the state to go on from. Collective. Raises UserError on every rank."""
    damaged: list[dict[str, str]] = []
    random = randomness()
    saved = restore(
        record.folder.checkpoints,
        {**engine.tensors(), **random},
        mesh,
        lambda path, reason: damaged.append({"path": str(path), "reason": reason}),
        alive=lambda: record.supervisor.heartbeat(0),
    )
    if saved is None:
        return _first(engine, record, mesh)
    engine.after_restore()
    torch.set_rng_state(random["rng.torch"].local)
    state = State.from_json(saved)
    record.resumed(state)
    for one in damaged:
        record.event("fallback", state, **one)
        record.console.say(f"{one['path']} is damaged ({one['reason']}); taking the one before")
    if mesh.is_first:
        _tell_of_lost(record, state, {Path(one["path"]).name for one in damaged})
    try:
        said = check_rate(saved, record.folder, record.config, state)
    except UserError as error:
        record.event("refuse", state, reason=error.what)
        raise
    record.event("restore", state, reason="the run is going on")
    record.console.say(f"going on from step {state.step}")
    if said:
        record.console.say(said)
    return state


def _tell_of_lost(record: Recorder, state: State, damaged: set[str]) -> None:
    """A checkpoint that was saved after the one that is gone on from, and is not there, is a fall-back too."""
    saves: list[int] = []
    for event in read_ledger(record.folder.ledger_file):
        if event["event"] in RETURNS:
            saves = [step for step in saves if step <= event["step"]]
        elif event["event"] == "save":
            saves.append(int(event["step"]))
    last = saves[-1] if saves else state.step
    path = record.folder.checkpoints / step_name(last)
    if last != state.step and path.name not in damaged and not path.exists():
        record.event("fallback", state, path=str(path), reason="it was saved, and is not there")
        record.console.say(f"{path} was saved, and is not there; taking step {state.step}")


def check_rate(saved: Mapping[str, Any], folder: RunFolder, config: RunConfig, state: State) -> str:
    """Assert the rate of the next step against the checkpoint's; a line that shows both where it was changed.

    Raises UserError when nothing that decides it was changed, and it is another all the same.
    """
    rate = learning_rate(config, state.step, state.tokens)
    old = from_json(json.dumps(saved["config"])) if "config" in saved else folder.history().config
    if old is not None and decides_rate(changes(old, config)):
        was = saved.get("learning_rate", learning_rate(old, state.step, state.tokens))
        by = f"{was:.4g} by the settings it was saved with, {rate:.4g} by those of now"
        return f"learning rate of step {state.step + 1}: {by}"
    if "learning_rate" in saved and not math.isclose(
        rate, saved["learning_rate"], rel_tol=CLOSE, abs_tol=CLOSE * config.optimizer.learning_rate
    ):
        versions = saved.get("versions") or {}
        raise UserError(
            f"the learning rate of step {state.step + 1} would be {rate:.6g}, "
            f"and the checkpoint was written for {saved['learning_rate']:.6g}",
            where=str(folder.path),
            why="nothing that decides it was changed: the schedule of this minka is another, or the checkpoint lies",
            remedy=f"go on with the minka that wrote it ({versions.get('minka', 'version unknown')}), "
            f"or start a run of its own from it (run.name=NEW run.start_from={config.run.name})",
            status=ExitStatus.NEEDS_PERSON,
        )
    return ""


def _first(engine: Engine, record: Recorder, mesh: Mesh) -> State:
    """No checkpoint of its own: from the parent's, or the initial weights that are there already."""
    problem: UserError | None = None
    try:
        parent = pinned_parent(record.folder)
    except UserError as error:
        problem = error
    agree(problem, mesh)
    state = State()
    if parent:
        place, said = begins_at(parent, record.config, record.store.hash)
        state = State(*place)
        record.forked(state)
        load_parent(parent, engine, record.config.run.start_with, mesh, lambda: record.supervisor.heartbeat(0))
        record.console.say(said)
        if parent.learning_rate is not None and state.step:
            rate = learning_rate(record.config, state.step, state.tokens)
            record.console.say(
                f"learning rate of step {state.step + 1}: {parent.learning_rate:.4g} there, {rate:.4g} here"
            )
    history = record.folder.history() if mesh.is_first else None
    if history and history.starts:
        origin = parent.name if parent else "its initial weights"
        reason = f"the run ended before its first checkpoint, and begins again from {origin}"
        record.event("restart", state, reason=reason)
        record.console.say(reason)
    return state


def load_parent(
    parent: Parent, engine: Engine, start_with: str, mesh: Mesh, alive: Callable[[], None] = lambda: None
) -> None:
    """Weights, or everything, of the parent into the engine's tensors. Collective; leased while it is read."""
    tensors = engine.tensors()
    if start_with == "weights":
        tensors = {name: piece for name, piece in tensors.items() if name.startswith("model.")}
    if parent.checkpoint is None:
        _load_hub_folder(parent, tensors, mesh)
        engine.after_restore()
        return
    with ExitStack() as stack:
        lease = leased(parent.folder, parent.checkpoint)
        on_first(lambda: stack.enter_context(lease), mesh)  # and nobody reads before it is there
        restore_from(parent.checkpoint, tensors, mesh, alive=alive)
        engine.after_restore()
        mesh.barrier()


def on_first(work: Callable[[], object], mesh: Mesh) -> None:
    """Do `work` on rank 0 while the others wait; a UserError of it ends every rank."""
    problem: UserError | None = None
    if mesh.is_first:
        try:
            work()
        except UserError as error:
            problem = error
    agree(problem, mesh)


def agree(problem: UserError | None, mesh: Mesh) -> None:
    """End every rank when one has a problem: with its own words where it is, with rank 0's status elsewhere."""
    status, found = mesh.sum_on_host(
        [int(problem.status) if problem and mesh.is_first else 0, int(problem is not None)]
    )
    if found:
        raise problem or SystemExit(status or int(ExitStatus.REFUSED))


def _load_hub_folder(parent: Parent, tensors: Mapping[str, Piece], mesh: Mesh) -> None:
    problem: UserError | None = None
    mine: dict[str, list[Piece]] = {}
    for key, piece in tensors.items():
        mine.setdefault(tensor_name(key), []).append(piece)
    try:
        with torch.no_grad():
            for name, whole in read_tensors(parent.folder, parent.model):
                for piece in mine[f"model.{name}"]:
                    box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.local.shape, strict=True))
                    piece.local.copy_(whole[box])
    except UserError as error:
        problem = error
    agree(problem, mesh)
