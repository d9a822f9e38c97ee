"""The training loop: everything that happens in a step, in this order."""

from dataclasses import dataclass
from typing import NamedTuple

from minka.data.loader import Loader
from minka.launch.supervisor_link import SupervisorLink
from minka.parallel.engine import Engine
from minka.parallel.mesh import Mesh
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.train.accept_step import accepts, refuse_tokens
from minka.train.due import checkpoint_due, detail_due, eval_due
from minka.train.layer_stats import LayerStats, Updates
from minka.train.metrics import Metrics, Stopwatch
from minka.train.profiler import Profile
from minka.train.recorder import Recorder
from minka.train.schedule import learning_rate
from minka.train.state import State


@dataclass
class Session:
    """What one rank needs to train; made by worker.py."""

    config: RunConfig
    mesh: Mesh
    engine: Engine
    optimizer: Updates
    loader: Loader
    record: Recorder
    supervisor: SupervisorLink
    profile: Profile
    evaluate_first: bool  # the run was ended before an evaluation that was due at its checkpoint


class TrainingEnd(NamedTuple):
    """How training ended."""

    state: State  # that was to be saved; where a rule stopped the run, that of the last step
    status: ExitStatus
    reason: str
    usable: bool  # the weights are saved, and the steps after them were not refused


def train(run: Session, state: State) -> TrainingEnd:
    """Train from `state` to the end of the run, a stop, or a verdict that needs a person. Collective."""
    config, mesh, engine, record = run.config, run.mesh, run.engine, run.record
    began, metrics, watch, status = state, Metrics(config, mesh, state), Stopwatch(), ExitStatus.DONE
    if run.evaluate_first:
        record.evaluate(state, engine, watch)
    while status == ExitStatus.DONE and not config.finished(state.step, state.tokens):
        with watch.time("data"):
            batch, micro_batches, loaded = next(run.loader)
            beyond = batch.largest_token() >= config.model.vocab
            counted = batch.target_count if mesh.leads_data else 0
            targets, stop, broken = mesh.sum_on_host([counted, run.supervisor.stop_requested(), beyond])
        if broken:
            refuse_tokens(batch, config.model.vocab, mesh)
        if stop:
            status = ExitStatus.STOPPED
            break
        with watch.time("compute"):
            rate = learning_rate(config, state.step, state.tokens)
            sums = engine.forward_backward(micro_batches, targets)
            norm = engine.grad_norm()
            detail = (
                LayerStats(engine, run.optimizer, mesh, config.model) if detail_due(config, state.step + 1) else None
            )
            if detail:
                detail.before_apply(batch, config.layout.micro_batch)
        record.wait_for_copy(watch)  # the save under way has its own copy of what changes next
        with watch.time("compute"):
            engine.apply(rate, config.optimizer.max_norm, accepts(sums, norm))
        before, state = state, state.after(loaded)
        metrics.note(state, sums, norm, rate, targets, watch)
        if mesh.leads_data:
            record.samples(state, batch.samples)
        run.profile.step(state.step)
        run.supervisor.heartbeat(state.step)
        if detail:
            record.detail(state, detail.after_apply(rate))
        save, evaluate = record.save_waits or checkpoint_due(config, before, state), eval_due(config, before, state)
        if metrics.due or save or evaluate:  # only accepted steps are saved
            state, status = record.judge(metrics, state)
        if save:
            record.save(state, engine.tensors(), watch)
        if evaluate:
            record.evaluate(state, engine, watch)
    if status != ExitStatus.NEEDS_PERSON:
        state, judged = record.judge(metrics, state)
        status = status if judged == ExitStatus.DONE else judged
    return _end(run, began, state, status, watch)


def _end(run: Session, began: State, state: State, status: ExitStatus, watch: Stopwatch) -> TrainingEnd:
    """Save and evaluate the last accepted state, unless its weights are of no use. Collective."""
    record, kept, tensors = run.record, run.record.accepted, run.engine.tensors()
    if status == ExitStatus.DONE and kept.step == began.step < state.step and record.last_saved.step <= 0:
        status, record.refusal = ExitStatus.NEEDS_PERSON, "every step of the run was refused"
    if status != ExitStatus.NEEDS_PERSON:
        record.save(kept, tensors, watch)
        if status == ExitStatus.DONE:
            record.evaluate(kept, run.engine, watch)
            if not record.scores_are_finite:
                status, record.refusal = ExitStatus.NEEDS_PERSON, f"the scores of step {kept.step} are not finite"
        record.save(kept, tensors, watch)  # again if that one failed, which would lose work
    saved, reason, refused = record.saved(kept, watch), status.reason, state.refused_in_a_row
    if status == ExitStatus.NEEDS_PERSON:
        reason += f": {record.refusal}; {record.way_back()}"
    else:
        state = kept
        if not saved:
            status, reason = ExitStatus.FAILED, f"step {kept.step} could not be saved"
        elif status == ExitStatus.DONE:
            record.prune()
    record.event("stop", state, reason=reason, seconds=watch.read())
    usable = status == ExitStatus.DONE or (status == ExitStatus.STOPPED and not refused)
    return TrainingEnd(state, status, reason, usable)
