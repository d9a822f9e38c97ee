"""What may differ when a run is resumed, and when a run starts from it: one table, and pure checks of a run's state."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from shlex import quote
from typing import Literal, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.config_sections import BatchStage, ModelSection
from minka.plan.errors import ExitStatus, UserError
from minka.plan.load_config import flatten, validate
from minka.plan.run_state import RunState

Verdict = Literal["free", "shown", "asked", "refused"]  # asked: allowed where the user gave the key
Changes = dict[str, tuple[object, object]]  # "section.key" -> (old value, new value)


class ChangeRule(NamedTuple):
    """Whether a resume and a fork may change some keys, or the other keys of a section ("model.*")."""

    keys: str
    resume: Verdict
    fork: Verdict
    why: str


SHAPE = "layers d_model heads kv_heads head_dim d_ff vocab tied qkv_bias qk_norm".split()
# A key's own row takes precedence over its section's. `free`: no effect on the numbers beyond rounding.
RULES = (
    ChangeRule("format", "refused", "refused", "the file has a different meaning"),
    ChangeRule("layout.*", "free", "free", "every layout gives the same numbers and reads every checkpoint"),
    ChangeRule("checkpoint.*", "free", "free", "saving changes no weight"),
    ChangeRule(
        "checkpoint.folder",
        "refused",
        "free",
        "the checkpoints stay where they are; to move them, move their folder and make checkpoints/ a link to it",
    ),
    ChangeRule("eval.*", "free", "free", "a score changes no weight"),
    ChangeRule("tracking.*", "free", "free", "recording changes no weight"),
    ChangeRule("kernels.*", "free", "free", "every implementation has the same definition"),
    ChangeRule("guard.*", "free", "free", "it decides when a run stops, not what a step does"),
    ChangeRule("plan.*", "free", "free", "it says what was expected, not what a step does"),
    ChangeRule("run.folder", "free", "free", "it says where the run is stored"),
    ChangeRule("run.name", "free", "free", "a run is named after its folder, which may have been moved"),
    ChangeRule("run.start_from run.start_with", "refused", "free", "a run begins only once"),
    ChangeRule("run.max_steps run.max_tokens", "shown", "shown", "the run and its schedule become longer or shorter"),
    ChangeRule("run.*", "refused", "shown", "the weights and the order of samples follow from it"),
    ChangeRule("schedule.*", "shown", "shown", "it changes the learning rates of later steps"),
    ChangeRule("optimizer.*", "shown", "shown", "it changes later updates"),
    ChangeRule(
        "data.batch_tokens data.batch_warmup", "shown", "shown", "the same samples in the same order, in other batches"
    ),
    ChangeRule("data.store", "free", "shown", "the store is compared with the run's by its hash, wherever it is"),
    ChangeRule("data.*", "refused", "shown", "later steps would get different samples than the position stands for"),
    ChangeRule("model.z_loss", "shown", "shown", "it changes the objective of later steps"),
    *(ChangeRule(f"model.{key}", "refused", "refused", "the saved weights would not fit") for key in SHAPE),
    ChangeRule("model.init_std", "refused", "shown", "the initial weights follow from it"),
    ChangeRule("model.max_positions", "refused", "shown", "the export says it"),
    ChangeRule("model.*", "refused", "asked", "the same weights would compute a different function"),
)
LENGTH = ("run.max_steps", "run.max_tokens")
RATE = (*LENGTH, "schedule.", "optimizer.learning_rate", "data.batch_")


def rule_of(key: str) -> ChangeRule:
    """The row of the table for a key. Raises KeyError where there is none."""
    rows = {keys: rule for rule in RULES for keys in rule.keys.split()}
    return rows.get(key) or rows[key.split(".")[0] + ".*"]


def changes(old: RunConfig, new: RunConfig) -> Changes:
    """Every value in which two configurations differ; None stands for a key that is not set."""
    return _differences(*(flatten(config.model_dump(mode="json")) for config in (old, new)))


def model_changes(old: ModelSection, new: ModelSection) -> Changes:
    """The differences of two models: in their shape, in what their weights compute, and in how long a text may be."""
    keys = {*SHAPE, "rope_theta", "rope_scaling", "norm_eps", "max_positions"}
    return _differences(*(flatten({"model": model.model_dump(mode="json", include=keys)}) for model in (old, new)))


class Decision(NamedTuple):
    """What becomes of a run that has begun."""

    over: bool  # it is finished, and no given length is beyond its end
    changed: Changes  # against the configuration it was last trained with
    longer: tuple[str, ...] = ()  # overrides with which a run that is over would be as long as the file says

    @property
    def ignored(self) -> list[str]:
        """Changes without an effect on a run that is over."""
        return [key for key in self.changed if key not in (*LENGTH, "run.folder")]  # which differs in a moved run


def decide(
    state: RunState,
    config: RunConfig,
    where: str,
    *,
    given: Collection[str] = LENGTH,
    from_scratch: bool = False,
) -> Decision:
    """Decide whether the run in the folder `where` resumes as `config` describes it. Raises UserError if it cannot.

    `given` are the keys that the user gave for this run. A run that is finished gets a different length only from them:
    it may have been shortened by an override that is not repeated, and the user did not choose the recipe's length.
    """
    if state.unreadable_start and not from_scratch:
        why = "changes are checked against the configuration in it; a newer version of minka may have written it"
        again = f"restart at step 0 (minka train {quote(where)} --from-scratch)"
        remedy = f"resume with the version that wrote it, repair the line, or {again}"
        raise UserError(state.unreadable_start, why=why, remedy=remedy)
    changed = changes(state.config, config) if state.config else {}
    edited = changes(state.started_with, state.in_file) if state.started_with and state.in_file else {}
    check_resume(changed, config, where, edited=list(edited))
    if from_scratch:
        return Decision(False, changed)
    if state.finished and not any(key in changed and key in given for key in LENGTH):
        longer = state.config is not None and config.total_tokens > state.config.total_tokens
        ends = [f"{key}={changed[key][1]}" for key in LENGTH if key in changed and changed[key][1] is not None]
        return Decision(True, changed, tuple(ends) if longer else ())
    if state.last_save is not None and not state.checkpoints:
        what = "this run has saved checkpoints, and all of them are gone: it would begin again at step 0"
        remedy = f"put them back, or restart on purpose: `minka train {quote(where)} --from-scratch`"
        raise UserError(what, where=f"{where}/checkpoints", remedy=remedy, status=ExitStatus.NEEDS_PERSON)
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
    refused = {key: change for key, change in changed.items() if rule_of(key).resume == "refused"}
    if not refused:
        return
    name = config.run.name
    if any(rule_of(key).fork == "refused" for key in refused):
        no_parent = "run.start_from= " if config.run.start_from else ""
        new = f"begin a new run from new weights ({no_parent}run.name=NEW)"
    else:
        new = f"start a new run from this one (run.name=NEW run.start_from={name})"
    old = f"resume the old one unchanged (minka train {quote(where)})"
    typed = [key for key in edited if rule_of(key).resume == "refused"]
    if typed:
        old = f"resume the old one: set {', '.join(typed)} back in {where}/run.toml, which was edited since its start"
    what = f"run {name!r} exists with different settings: {'; '.join(describe_changes(refused))}"
    raise UserError(what, where=where, why=_reasons(refused), remedy=f"{new}, or {old}")


def check_fork(changed: Changes, parent: str, given: Collection[str] = ()) -> None:
    """Raises UserError naming each change with which a run cannot start from `parent`. `given`: keys the user gave."""
    refused = {key: change for key, change in changed.items() if rule_of(key).fork == "refused"}
    if refused:
        what = f"a run cannot start from {parent} with different settings: {'; '.join(describe_changes(refused))}"
        remedy = "use the parent's values, or leave run.start_from out to begin from new weights"
        raise UserError(what, where="run.start_from", why=_reasons(refused), remedy=remedy)
    asked = {_setting(key) for key in given}
    silent = {k: pair for k, pair in changed.items() if rule_of(k).fork == "asked" and _setting(k) not in asked}
    if silent:
        what = f"{parent} was trained with different settings, and nobody asked for new ones"
        why = f"{_reasons(silent)}: {'; '.join(describe_changes(silent))}"
        old, new = (_as_overrides({key: pair[side] for key, pair in silent.items()}) for side in (0, 1))
        remedy = f"add the parent's ({old}), or ask for the new ones by adding {new}"
        raise UserError(what, where="run.start_from", why=why, remedy=remedy)


def explain_model_changes(changed: Changes) -> list[str]:
    """A line with the reason for each change of the model that a run makes to its parent's."""
    shown = {key: pair for key, pair in changed.items() if key.startswith("model.")}
    return [f"{line}: {rule_of(key).why}" for key, line in zip(shown, describe_changes(shown), strict=True)]


def _setting(key: str) -> str:
    """The setting that a key belongs to: model.rope_scaling.factor to model.rope_scaling."""
    return ".".join(key.split(".")[:2])


def _as_overrides(values: Mapping[str, object]) -> str:
    """Values as a user gives them on the command line."""
    unset = {_setting(key) for key, value in values.items() if value is None}
    return " ".join([*(f"{k}={v}" for k, v in values.items() if v is not None), *(f"{k}=none" for k in sorted(unset))])


def check_length(changed: Mapping[str, object], config: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError when a changed length would end the run before its position."""
    run = config.run
    lengths = (("step", run.max_steps, step), ("token", run.max_tokens, tokens))
    for key, (unit, length, at) in zip(LENGTH, lengths, strict=True):
        if key in changed and length is not None and length < at:
            earlier = f"start a new run from an earlier checkpoint (run.name=NEW run.start_from={run.name}@STEP)"
            what = f"the run is at {unit} {at} already, after {key}={length}; trained steps are not undone"
            raise UserError(what, where=run.name, remedy=f"give a greater length, or {earlier}")


def check_batch(old: RunConfig, new: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError where the end of `new`, resumed at (step, tokens), cannot be computed in schedule.unit.

    Steps follow from tokens, and tokens from steps, only when the batches so far are those that `new` describes.
    """
    if _end_is_known(new, step, tokens):
        return
    stages = [stage for stage in old.data.batch_warmup if stage.until_tokens < tokens]
    stages.append(BatchStage(until_tokens=tokens, batch_tokens=old.batch_tokens_at(tokens - 1)))
    listed = ", ".join(f"{{until_tokens={s.until_tokens}, batch_tokens={s.batch_tokens}}}" for s in stages)
    values = new.model_dump(mode="json")
    values["data"]["batch_warmup"] = [stage.model_dump() for stage in stages]
    remedy = "give both in the same unit"
    with suppress(UserError):  # not valid, or not enough: a parent that was a fork does not describe all its batches
        if _end_is_known(validate(values, new.run.name), step, tokens):
            remedy = f"describe the batches so far: 'data.batch_warmup=[{listed}]'; or {remedy}"
    end = LENGTH[0] if new.run.max_steps is not None else LENGTH[1]
    what = f"{end} with schedule.unit={new.schedule.unit!r} needs the batches that the run has had"
    why = "data.batch_tokens and data.batch_warmup describe different ones, and would give wrong learning rates"
    raise UserError(what, where=new.run.name, why=why, remedy=remedy)


def _end_is_known(config: RunConfig, step: int, tokens: int) -> bool:
    """Whether the end is in schedule.unit, or the batches of `config` lead to (step, tokens)."""
    if (config.run.max_steps is not None) == (config.schedule.unit == "steps"):
        return True
    here = config.run.model_copy(update={"max_steps": step, "max_tokens": None})
    return config.model_copy(update={"run": here}).total_tokens == tokens


def decides_rate(changed: Mapping[str, object]) -> bool:
    """Whether one of the changes affects the learning rate of later steps."""
    return any(key.startswith(RATE) for key in changed)


def describe_changes(changed: Changes) -> list[str]:
    """One line for each change."""
    values = {key: ["not set" if value is None else repr(value) for value in both] for key, both in changed.items()}
    return [f"{key} = {new} (was {old})" for key, (old, new) in values.items()]


def _differences(one: Mapping[str, object], other: Mapping[str, object]) -> Changes:
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _reasons(keys: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(rule_of(key).why for key in keys))
