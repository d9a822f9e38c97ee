"""What may differ when a run is resumed, and when a run starts from it: one table, and pure checks of a run's state.

Nothing here reads a file: run_state.py reads, these functions decide.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.config_sections import BatchStage, ModelSection
from minka.plan.errors import ExitStatus, UserError
from minka.plan.load_config import flatten, validate
from minka.plan.run_state import RunState

Verdict = Literal["free", "shown", "refused"]
Changes = dict[str, tuple[object, object]]  # "section.key" -> (old value, new value)


class Rule(NamedTuple):
    """Whether a resume and a fork may change a key, or the other keys of a section ("model.*")."""

    keys: str
    resume: Verdict
    fork: Verdict
    why: str


SHAPE = "layers d_model heads kv_heads head_dim d_ff vocab tied qkv_bias qk_norm".split()
# A key's own row takes precedence over its section's. `free`: no effect on the numbers beyond rounding.
RULES = (
    Rule("format", "refused", "refused", "the file has a different meaning"),
    Rule("layout.*", "free", "free", "every layout gives the same numbers and reads every checkpoint"),
    Rule("checkpoint.*", "free", "free", "saving changes no weight"),
    Rule("eval.*", "free", "free", "a score changes no weight"),
    Rule("tracking.*", "free", "free", "recording changes no weight"),
    Rule("kernels.*", "free", "free", "every implementation has the same definition"),
    Rule("guard.*", "free", "free", "it decides when a run stops, not what a step does"),
    Rule("run.folder", "free", "free", "it says where the run is stored"),
    Rule("run.name", "free", "free", "a run is named after its folder, which may have been moved"),
    Rule("run.start_from", "refused", "free", "a run begins only once"),
    Rule("run.start_with", "refused", "free", "a run begins only once"),
    Rule("run.max_steps", "shown", "shown", "the run becomes longer or shorter, and its schedule with it"),
    Rule("run.max_tokens", "shown", "shown", "the run becomes longer or shorter, and its schedule with it"),
    Rule("run.*", "refused", "shown", "the weights and the order of samples follow from it"),
    Rule("schedule.*", "shown", "shown", "it changes the learning rates of later steps"),
    Rule("optimizer.*", "shown", "shown", "it changes later updates"),
    Rule("data.batch_tokens", "shown", "shown", "the same samples in the same order, in different batches"),
    Rule("data.batch_warmup", "shown", "shown", "the same samples in the same order, in different batches"),
    Rule("data.*", "refused", "shown", "later steps would get different samples than the position stands for"),
    Rule("model.z_loss", "shown", "shown", "it changes the objective of later steps"),
    *(Rule(f"model.{key}", "refused", "refused", "the saved weights would not fit") for key in SHAPE),
    Rule("model.*", "refused", "shown", "the same weights would compute a different function"),
)
LENGTH = ("run.max_steps", "run.max_tokens")
RATE = (*LENGTH, "schedule.", "optimizer.learning_rate", "data.batch_")


def rule_of(key: str) -> Rule:
    """The row of the table for a key. Raises KeyError where there is none."""
    rows = {rule.keys: rule for rule in RULES}
    return rows.get(key) or rows[key.split(".")[0] + ".*"]


def changes(old: RunConfig, new: RunConfig) -> Changes:
    """Every value in which two configurations differ; None stands for a key that is not set."""
    return _differences(*(flatten(config.model_dump(mode="json")) for config in (old, new)))


def model_changes(old: ModelSection, new: ModelSection) -> Changes:
    """The differences of two models: in their shape, and in what their weights compute."""
    keys = {*SHAPE, "rope_theta", "rope_scaling", "norm_eps"}
    return _differences(*(flatten({"model": model.model_dump(mode="json", include=keys)}) for model in (old, new)))


class Decision(NamedTuple):
    """What becomes of a run that has begun."""

    over: bool  # it is finished, and no given length is beyond its end
    changed: Changes  # against the configuration it was last trained with

    @property
    def ignored(self) -> list[str]:
        """Changes without an effect on a run that is over."""
        return [key for key in self.changed if key not in LENGTH]


def decide(state: RunState, config: RunConfig, where: str, *, from_scratch: bool = False) -> Decision:
    """Decide whether the run in the folder `where`, which has begun, resumes as `config` describes it.

    Raises UserError when it cannot.
    """
    if state.unreadable_start and not from_scratch:
        raise UserError(
            state.unreadable_start,
            why="it holds the configuration that the run was last trained with, and changes are checked against it; "
            "a newer version of minka may have written it",
            remedy=f"resume with the version that wrote it, or restart at step 0 (minka train {where} --from-scratch)",
        )
    changed = changes(state.config, config) if state.config else {}
    check_resume(changed, config, where, edited=_edited(state))
    if from_scratch:
        return Decision(False, changed)
    longer = any(key in changed for key in LENGTH)
    if state.finished and not longer:
        return Decision(True, changed)
    _check_history(state, where)
    at = state.position
    if at is None:  # where no checkpoint can be read, the restore says why
        return Decision(False, changed)
    check_length(changed, config, at.step, at.tokens)
    if state.config and decides_rate(changed):
        check_batch(state.config, config, at.step, at.tokens)
    return Decision(state.finished and config.finished(at.step, at.tokens), changed)


def check_resume(changed: Changes, config: RunConfig, where: str, *, edited: Sequence[str] = ()) -> None:
    """Raises UserError naming each change with which the run `config.run.name` cannot resume.

    `edited` are keys that were changed in its run.toml since it was last started.
    """
    refused = [key for key in changed if rule_of(key).resume == "refused"]
    if not refused:
        return
    name = config.run.name
    if any(rule_of(key).fork == "refused" for key in refused):
        no_parent = "run.start_from= " if config.run.start_from else ""
        new = f"begin a new run from new weights ({no_parent}run.name=NEW)"
    else:
        new = f"start a new run from this one (run.name=NEW run.start_from={name})"
    old = f"resume the old one unchanged (minka train {where})"
    typed = [key for key in edited if rule_of(key).resume == "refused"]
    if typed:
        old = f"resume the old one: set {', '.join(typed)} back in {where}/run.toml, which was edited since its start"
    raise UserError(
        f"run {name!r} exists with different settings: {_listed(changed, refused)}",
        where=where,
        why=_reasons(refused),
        remedy=f"{new}, or {old}",
    )


def _edited(state: RunState) -> list[str]:
    return list(changes(state.started_with, state.in_file)) if state.started_with and state.in_file else []


def _check_history(state: RunState, where: str) -> None:
    """Raises UserError when the run has saved checkpoints and none is left: it must not begin again unnoticed."""
    if state.last_save is not None and not state.checkpoints:
        raise UserError(
            "this run has saved checkpoints, and all of them are gone",
            where=f"{where}/checkpoints",
            why="it would begin again at step 0, and its training so far would be lost",
            remedy=f"put them back, or restart on purpose: `minka train {where} --from-scratch`",
            status=ExitStatus.NEEDS_PERSON,
        )


def check_fork(changed: Changes, parent: str) -> None:
    """Raises UserError naming each change with which a run cannot start from `parent`."""
    refused = [key for key in changed if rule_of(key).fork == "refused"]
    if refused:
        raise UserError(
            f"a run cannot start from {parent} with a different {', '.join(refused)}: {_listed(changed, refused)}",
            where="run.start_from",
            why=_reasons(refused),
            remedy="use the parent's values, or leave run.start_from out to begin from new weights",
        )


def check_length(changed: Mapping[str, object], config: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError when a changed length would end the run before its position."""
    for key, length, at, unit in (
        ("run.max_steps", config.run.max_steps, step, "step"),
        ("run.max_tokens", config.run.max_tokens, tokens, "token"),
    ):
        if key in changed and length is not None and length < at:
            raise UserError(
                f"the run is at {unit} {at} already, after {key}={length}",
                where=config.run.name,
                why="steps that have been trained are not undone",
                remedy=f"give a greater length, or start a new run from an earlier checkpoint "
                f"(run.name=NEW run.start_from={config.run.name}@STEP)",
            )


def check_batch(old: RunConfig, new: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError where the end of `new`, resumed at (step, tokens), cannot be computed in schedule.unit.

    Steps follow from tokens, and tokens from steps, only when the batches so far are those that `new` describes.
    """
    if _end_is_known(new, step, tokens):
        return
    stages = [stage for stage in old.data.batch_warmup if stage.until_tokens < tokens]
    stages.append(BatchStage(until_tokens=tokens, batch_tokens=old.batch_tokens_at(tokens - 1)))
    listed = ", ".join(f"{{until_tokens={s.until_tokens}, batch_tokens={s.batch_tokens}}}" for s in stages)
    # The configuration of a parent that was itself a fork does not describe the batches before that fork.
    remedied = _with_stages(new, stages)
    works = remedied is not None and _end_is_known(remedied, step, tokens)
    describe = f"describe the batches so far: 'data.batch_warmup=[{listed}]'; or " if works else ""
    end = "run.max_steps" if new.run.max_steps is not None else "run.max_tokens"
    raise UserError(
        f"{end} with schedule.unit={new.schedule.unit!r} needs the batches that the run has had, and data.batch_tokens "
        "and data.batch_warmup describe different ones",
        where=new.run.name,
        why=f"the end in {new.schedule.unit} would be wrong, and the learning rate with it",
        remedy=f"{describe}give both in the same unit",
    )


def _end_is_known(config: RunConfig, step: int, tokens: int) -> bool:
    """Whether the end is in schedule.unit, or the batches of `config` lead to (step, tokens)."""
    if (config.run.max_steps is not None) == (config.schedule.unit == "steps"):
        return True
    here = config.run.model_copy(update={"max_steps": step, "max_tokens": None})
    return config.model_copy(update={"run": here}).total_tokens == tokens


def _with_stages(config: RunConfig, stages: Sequence[BatchStage]) -> RunConfig | None:
    """`config` with these stages as its batch warm-up; None where that is not valid."""
    values = config.model_dump(mode="json")
    values["data"]["batch_warmup"] = [stage.model_dump() for stage in stages]
    try:
        return validate(values, config.run.name)
    except UserError:
        return None


def decides_rate(changed: Mapping[str, object]) -> bool:
    """Whether one of the changes affects the learning rate of later steps."""
    return any(key.startswith(RATE) for key in changed)


def describe_changes(changed: Changes) -> list[str]:
    """One line for each change."""
    return [f"{key} = {_value(new)} (was {_value(old)})" for key, (old, new) in changed.items()]


def _differences(one: Mapping[str, object], other: Mapping[str, object]) -> Changes:
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _listed(changed: Changes, keys: list[str]) -> str:
    return "; ".join(f"{key} was {_value(changed[key][0])} and is now {_value(changed[key][1])}" for key in keys)


def _reasons(keys: list[str]) -> str:
    return "; ".join(dict.fromkeys(rule_of(key).why for key in keys))


def _value(value: object) -> str:
    return "not set" if value is None else repr(value)
