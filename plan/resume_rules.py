"""What of a run may be another when it goes on, and when a run starts from it: one table, with the reason for each."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.config_sections import BatchStage, ModelSection
from minka.plan.errors import UserError
from minka.plan.load_config import flatten, validate

Verdict = Literal["free", "shown", "refused"]
Changes = dict[str, tuple[object, object]]  # "section.key" -> (as it was, as it is)


class Rule(NamedTuple):
    """Of one key, or of a section's other keys ("model.*"): whether a resume and a fork may have another value."""

    keys: str
    resume: Verdict
    fork: Verdict
    why: str


SHAPE = "layers d_model heads kv_heads head_dim d_ff vocab tied qkv_bias qk_norm".split()
# A key's own row counts before its section's. `free` has no effect on the numbers beyond rounding.
RULES = (
    Rule("format", "refused", "refused", "the file says something else"),
    Rule("layout.*", "free", "free", "every layout gives the same numbers, and a checkpoint belongs to none"),
    Rule("checkpoint.*", "free", "free", "when a run is saved changes nothing in it"),
    Rule("eval.*", "free", "free", "a score changes no weight"),
    Rule("tracking.*", "free", "free", "what is written down changes no weight"),
    Rule("kernels.*", "free", "free", "every implementation has the same definition"),
    Rule("guard.*", "free", "free", "it says when a run stops, not what a step does"),
    Rule("run.folder", "free", "free", "it says where the run lies"),
    Rule("run.name", "free", "free", "a run is where it lies, and may have been moved"),
    Rule("run.start_from", "refused", "free", "a run begins once"),
    Rule("run.start_with", "refused", "free", "a run begins once"),
    Rule("run.max_steps", "shown", "shown", "the run becomes longer or shorter, and its schedule with it"),
    Rule("run.max_tokens", "shown", "shown", "the run becomes longer or shorter, and its schedule with it"),
    Rule("run.*", "refused", "shown", "weights and order of samples follow from it"),
    Rule("schedule.*", "shown", "shown", "the rates of the steps to come are others"),
    Rule("optimizer.*", "shown", "shown", "the updates to come are others"),
    Rule("data.batch_tokens", "shown", "shown", "the same samples in the same order, in other batches"),
    Rule("data.batch_warmup", "shown", "shown", "the same samples in the same order, in other batches"),
    Rule("data.*", "refused", "shown", "the steps to come would be of other samples than the position means"),
    Rule("model.z_loss", "shown", "shown", "the objective of the steps to come is another"),
    *(Rule(f"model.{key}", "refused", "refused", "the saved weights would not fit") for key in SHAPE),
    Rule("model.*", "refused", "shown", "the same weights would compute something else"),
)
LENGTH = ("run.max_steps", "run.max_tokens")
RATE = (*LENGTH, "schedule.", "optimizer.learning_rate", "data.batch_")


def rule_of(key: str) -> Rule:
    """The row of the table that decides about a key. Raises KeyError where the table has none."""
    rows = {rule.keys: rule for rule in RULES}
    return rows.get(key) or rows[key.split(".")[0] + ".*"]


def changes(old: RunConfig, new: RunConfig) -> Changes:
    """Every value in which two runs differ; None stands for a key that is not set."""
    one, other = (flatten(config.model_dump(mode="json")) for config in (old, new))
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def model_changes(old: ModelSection, new: ModelSection) -> Changes:
    """The same of two models, as far as a model alone can say: its shape and what its weights compute."""
    said = {*SHAPE, "rope_theta", "rope_scaling", "norm_eps"}
    one, other = (flatten({"model": section.model_dump(mode="json", include=said)}) for section in (old, new))
    keys = sorted(one.keys() | other.keys())
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def check_resume(
    changed: Changes, name: str, where: str, *, edited: Collection[str] = (), forked: bool = False
) -> None:
    """Raises UserError naming each change with which the run `name` cannot go on.

    For its remedy: what a person has `edited` in the run's run.toml, and whether run.start_from is set.
    """
    refused = [key for key in changed if rule_of(key).resume == "refused"]
    if not refused:
        return
    shaped = [key for key in refused if rule_of(key).fork == "refused"]
    if shaped:
        new = f"begin another run, from new weights ({'run.start_from= ' if forked else ''}run.name=NEW)"
    else:
        new = f"start a run of its own from it (run.name=NEW run.start_from={name})"
    old = f"go on with the old one as it was (minka train {where})"
    typed = [key for key in edited if rule_of(key).resume == "refused"]
    if typed:
        values = ", ".join(typed)
        old = (
            f"go on with the old one: set {values} back in {where}/run.toml, which was edited since the run was started"
        )
    raise UserError(
        f"a run called {name!r} exists, and it cannot go on with other values: {_listed(changed, refused)}",
        where=where,
        why=_reasons(refused),
        remedy=f"{new}, or {old}",
    )


def check_fork(changed: Changes, parent: str) -> None:
    """Raises UserError naming each change with which no run can start from `parent`."""
    refused = [key for key in changed if rule_of(key).fork == "refused"]
    if refused:
        raise UserError(
            f"a run cannot start from {parent} with another {', '.join(refused)}: {_listed(changed, refused)}",
            where="run.start_from",
            why=_reasons(refused),
            remedy="set them to the parent's values, or leave run.start_from out to begin from new weights",
        )


def check_length(changed: Mapping[str, object], config: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError when a changed length would end the run before the place where it stands."""
    run = config.run
    steps = run.max_steps is not None and "run.max_steps" in changed and run.max_steps < step
    if steps or (run.max_tokens is not None and "run.max_tokens" in changed and run.max_tokens < tokens):
        given, stands = (
            (f"run.max_steps={run.max_steps}", f"step {step}")
            if steps
            else (f"run.max_tokens={run.max_tokens}", f"{tokens} tokens")
        )
        raise UserError(
            f"the run stands at {stands} already, and {given} lies before that",
            where=run.name,
            why="what has been trained is not taken back",
            remedy=f"give more, or start a run of its own from an earlier checkpoint "
            f"(run.name=NEW run.start_from={run.name}@STEP)",
        )


def check_batch(old: RunConfig, new: RunConfig, step: int, tokens: int) -> None:
    """Raises UserError where the end of `new`, which goes on at (step, tokens), cannot be reckoned in schedule.unit.

    Steps follow from tokens, and tokens from steps, only when the batches so far are those that `new` describes.
    """
    if _reckons(new, step, tokens):
        return
    stages = [stage for stage in old.data.batch_warmup if stage.until_tokens < tokens]
    stages.append(BatchStage(until_tokens=tokens, batch_tokens=old.batch_tokens_at(tokens - 1)))
    listed = ", ".join(f"{{until_tokens={s.until_tokens}, batch_tokens={s.batch_tokens}}}" for s in stages)
    # A parent that was a fork itself had batches that its own configuration does not tell of.
    remedied = _with_stages(new, stages)
    works = remedied is not None and _reckons(remedied, step, tokens)
    say = f"say what was: 'data.batch_warmup=[{listed}]'; or " if works else ""
    end = "run.max_steps" if new.run.max_steps is not None else "run.max_tokens"
    raise UserError(
        f"{end} with schedule.unit={new.schedule.unit!r} needs the batches that the run has had, and data.batch_tokens "
        "and data.batch_warmup describe others",
        where=new.run.name,
        why=f"the end in {new.schedule.unit} would be reckoned wrongly, and the learning rate with it",
        remedy=f"{say}count both in the same unit",
    )


def _reckons(config: RunConfig, step: int, tokens: int) -> bool:
    """Whether the end is in schedule.unit, or the batches of `config` come to (step, tokens)."""
    if (config.run.max_steps is not None) == (config.schedule.unit == "steps"):
        return True
    here = config.run.model_copy(update={"max_steps": step, "max_tokens": None})
    return config.model_copy(update={"run": here}).total_tokens == tokens


def _with_stages(config: RunConfig, stages: Sequence[BatchStage]) -> RunConfig | None:
    """`config` with these stages as its batch warm-up; None where they are none."""
    values = config.model_dump(mode="json")
    values["data"]["batch_warmup"] = [stage.model_dump() for stage in stages]
    try:
        return validate(values, config.run.name)
    except UserError:
        return None


def decides_rate(changed: Mapping[str, object]) -> bool:
    """Whether one of the changes moves the learning rate of the steps to come."""
    return any(key.startswith(RATE) for key in changed)


def told(changed: Changes) -> list[str]:
    """A line for people of each change."""
    return [f"{key} = {_value(new)} (was {_value(old)})" for key, (old, new) in changed.items()]


def _listed(changed: Changes, keys: list[str]) -> str:
    return "; ".join(f"{key} is {_value(changed[key][0])} there and {_value(changed[key][1])} here" for key in keys)


def _reasons(keys: list[str]) -> str:
    return "; ".join(dict.fromkeys(rule_of(key).why for key in keys))


def _value(value: object) -> str:
    return "not set" if value is None else repr(value)
