"""What may be another on a resume and on a fork: every setting has a rule, and a refusal names the setting."""

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any

import pytest

from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.load_config import flatten, load_run
from minka.plan.resume_rules import (
    RULES,
    check_batch,
    check_fork,
    check_length,
    check_resume,
    decide,
    decides_rate,
    describe_changes,
    explain_model_changes,
    rule_of,
)
from minka.plan.resume_rules import changes as changes_between
from minka.plan.run_state import Position, RunState

FREE = "layout checkpoint eval tracking kernels guard plan".split()
SHOWN = "run.max_steps run.max_tokens data.batch_tokens data.batch_warmup model.z_loss".split()
SHAPE = "layers d_model heads kv_heads head_dim d_ff vocab tied qkv_bias qk_norm".split()


def run(*overrides: str, recipe: str = "demo") -> RunConfig:
    return load_run(recipe, overrides).config


def keys() -> list[str]:
    """Every setting of a run, with and without the optional tables."""
    flat = (flatten(run(recipe=name).model_dump(mode="json")) for name in ("demo", "llama3-8b"))
    return sorted({key for keys in flat for key in keys} | {"model.rope_scaling.factor"})


@pytest.mark.parametrize("key", keys())
def test_what_may_be_another_on_resume_is_what_the_contract_says(key: str) -> None:
    section = key.split(".")[0]
    free = (section in FREE or key in ("run.folder", "run.name", "data.store")) and key != "checkpoint.folder"
    shown = section in ("schedule", "optimizer") or key in SHOWN
    assert rule_of(key).resume == ("free" if free else "shown" if shown else "refused")


@pytest.mark.parametrize("key", keys())
def test_a_fork_may_change_all_but_the_shape_of_the_weights(key: str) -> None:
    forbidden = key == "format" or key in [f"model.{name}" for name in SHAPE]
    assert (rule_of(key).fork == "refused") == forbidden


def test_every_row_of_the_table_is_about_a_setting_and_has_a_reason() -> None:
    used = {rule_of(key).keys for key in keys()}
    assert used == {rule.keys for rule in RULES}
    assert all(rule.why for rule in RULES)


def test_a_setting_without_a_rule_is_an_error() -> None:
    with pytest.raises(KeyError):
        rule_of("weather.rain")


def test_changes_are_all_that_differs_and_none_stands_for_not_set() -> None:
    changed = changes_between(run("run.max_steps=500"), run("run.max_tokens=900000", "layout.micro_batch=3"))
    was = run().layout.micro_batch
    assert changed == {
        "layout.micro_batch": (was, 3),
        "run.max_steps": (500, None),
        "run.max_tokens": (None, 900000),
    }
    assert describe_changes(changed)[1:] == [
        "run.max_steps = not set (was 500)",
        "run.max_tokens = 900000 (was not set)",
    ]
    assert changes_between(run(), run()) == {}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.seed=9", "run.seed"),
        ("model.norm_eps=1e-6", "model.norm_eps"),
        ("model.rope_theta=50000", "model.rope_theta"),
        ("data.seq_len=64", "data.seq_len"),
        ("data.max_bytes=7", "data.max_bytes"),
        ("data.dropped_samples=[[1,2]]", "data.dropped_samples"),
        ("run.start_from=other", "run.start_from"),
    ],
)
def test_a_resume_refuses_by_name_what_a_fork_may_have(override: str, key: str) -> None:
    changed = changes_between(run(), run(override))
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        check_resume(changed, run(), "runs/demo")
    assert "run.name=NEW run.start_from=demo" in caught.value.remedy
    check_fork(changed, "demo at step 5", given=[key])


@pytest.mark.parametrize(
    ("old", "new", "parents", "ours"),
    [
        ((), ("model.rope_theta=500000",), "(model.rope_theta=10000.0)", "adding model.rope_theta=500000.0"),
        ((), ("model.norm_eps=1e-6",), "(model.norm_eps=1e-05)", "adding model.norm_eps=1e-06"),
        ((), ("model.rope_scaling.factor=4",), "(model.rope_scaling=none)", "model.rope_scaling.factor=4.0"),
        (("model.rope_scaling.factor=4",), (), "model.rope_scaling.factor=4.0", "adding model.rope_scaling=none"),
        (("model.rope_scaling.factor=4",), ("model.rope_scaling.factor=8",), "factor=4.0)", "factor=8.0"),
    ],
)
def test_a_different_function_of_the_parents_weights_must_be_asked_for(
    old: tuple[str, ...], new: tuple[str, ...], parents: str, ours: str
) -> None:
    """A value of the template, or a default, does not ask; each of the two remedies is accepted as it is written."""
    changed = changes_between(run(*old), run(*new))
    with pytest.raises(UserError, match="nobody asked for new ones") as caught:
        check_fork(changed, "demo at step 5", given=["run.name", "optimizer.learning_rate"])
    assert "the same weights would compute a different function" in caught.value.why
    take, ask = caught.value.remedy.split(", or ask for the new ones by adding ")
    assert parents in take
    assert ours in caught.value.remedy
    taken = load_run("demo", [*new, *take.partition("(")[2].rstrip(")").split()]).config
    assert changes_between(run(*old), taken) == {}
    asked = load_run("demo", [*new, *ask.split()])
    assert changes_between(run(*new), asked.config) == {}
    check_fork(changed, "demo at step 5", asked.given)
    assert len(explain_model_changes(changed)) == len(changed)


@pytest.mark.parametrize("key", ["model.init_std", "model.max_positions", "model.z_loss"])
def test_what_leaves_the_function_as_it_is_need_not_be_asked_for(key: str) -> None:
    check_fork({key: (1, 2)}, "demo at step 5")


@pytest.mark.parametrize("name", SHAPE)
def test_what_a_fork_refuses_too_is_not_remedied_by_one(name: str) -> None:
    changed: dict[str, tuple[object, object]] = {f"model.{name}": (1, 2), "run.seed": (0, 1)}
    for config, new in ((run(), "(run.name=NEW)"), (run("run.start_from=x"), "(run.start_from= run.name=NEW)")):
        with pytest.raises(UserError, match=rf"model.{name} = 2 \(was 1\)") as caught:
            check_resume(changed, config, "runs/demo")
        assert f"from new weights {new}" in caught.value.remedy
        assert "run.start_from=demo" not in caught.value.remedy
        assert "(minka train runs/demo)" in caught.value.remedy


def test_a_run_toml_edited_by_hand_is_named_where_the_command_alone_would_be_refused_again() -> None:
    changed = changes_between(run(), run("run.seed=9"))
    with pytest.raises(UserError) as caught:
        check_resume(changed, run(), "runs/demo", edited=["run.seed", "schedule.warmup"])
    assert "set run.seed back in runs/demo/run.toml" in caught.value.remedy
    assert "minka train" not in caught.value.remedy


def test_a_resume_with_changes_that_are_allowed_is_allowed() -> None:
    allowed = ["layout.micro_batch=2", "run.max_steps=9999", "schedule.kind=linear", "optimizer.beta1=0.8"]
    check_resume(changes_between(run(), run(*allowed, "data.batch_tokens=512", "model.z_loss=1e-3")), run(), "here")


@pytest.mark.parametrize("name", SHAPE)
def test_a_fork_refuses_another_shape_by_name(name: str) -> None:
    model = run().model
    old = getattr(model, name)
    changed: dict[str, tuple[object, object]] = {f"model.{name}": (old, not old if isinstance(old, bool) else 2 * old)}
    with pytest.raises(UserError, match=rf"different settings: model.{name} = .* \(was {old}\)"):
        check_fork(changed, "demo at step 5")


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("run.max_steps=49", True),
        ("run.max_steps=50", False),
        ("run.max_tokens=599999", True),
        ("run.max_tokens=600000", False),
    ],
)
def test_a_length_before_the_place_where_the_run_stands_is_refused(override: str, refused: bool) -> None:
    new = run(override)
    changed = changes_between(run(), new)
    if refused:
        with pytest.raises(UserError, match=r"is at (step 50|token 600000) already"):
            check_length(changed, new, step=50, tokens=600_000)
    else:
        check_length(changed, new, step=50, tokens=600_000)
    check_length({}, new, step=50, tokens=600_000)  # a run that ends within a batch stands behind its own length


def test_another_batch_is_refused_only_where_steps_and_tokens_are_mixed_and_the_remedy_works() -> None:
    old = run("run.max_steps=100", "schedule.unit=tokens", "data.batch_tokens=512", "data.batch_warmup=[]")
    at = walk(old, 30)
    new = ["run.max_steps=100", "schedule.unit=tokens", "data.batch_tokens=1024", "data.batch_warmup=[]"]
    check_batch(old, old, *at)
    check_batch(old, run(*new, "schedule.unit=steps"), *at)
    with pytest.raises(UserError, match=r"batch_warmup=\[\{until_tokens=15360, batch_tokens=512\}\]") as caught:
        check_batch(old, run(*new), *at)
    remedy = run(*new, remedied(caught.value))
    check_batch(old, remedy, *at)
    assert [remedy.batch_tokens_at(tokens) for tokens in (at[1] - 1, at[1])] == [512, 1024]
    # Twice: the stages that the run has had by then are all in the remedy.
    later = walk(remedy, 40)
    with pytest.raises(UserError) as caught:
        check_batch(remedy, run(*new, "data.batch_tokens=256"), *later)
    check_batch(remedy, run(*new, "data.batch_tokens=256", remedied(caught.value)), *later)


def test_batches_that_no_warmup_can_tell_of_get_no_remedy_that_is_refused_again() -> None:
    # The parent forked at step 5 with batches of 512 and now counts as if it had had those of 256 from the start.
    old = run(
        "run.max_steps=20", "schedule.warmup=0", "schedule.unit=steps", "data.batch_tokens=256", "data.batch_warmup=[]"
    )
    new = run(
        "run.max_steps=30", "schedule.warmup=0", "schedule.unit=tokens", "data.batch_tokens=256", "data.batch_warmup=[]"
    )
    step, tokens = 10, 5 * 512 + 5 * 256
    with pytest.raises(UserError, match="both in the same unit") as caught:
        check_batch(old, new, step, tokens)
    assert "batch_warmup" not in caught.value.remedy
    check_batch(old, run("run.max_steps=30", "schedule.warmup=0", "schedule.unit=steps"), step, tokens)


def test_what_moves_the_learning_rate_is_known() -> None:
    moving: Sequence[str] = ("run.max_steps", "run.max_tokens", "schedule.warmup", "optimizer.learning_rate")
    assert all(decides_rate({key: None}) for key in (*moving, "data.batch_tokens", "data.batch_warmup"))
    assert not any(decides_rate({key: None}) for key in ("optimizer.beta1", "model.z_loss", "data.seq_len", "run.seed"))


def state(config: RunConfig, **fields: Any) -> RunState:
    """A run of `config` that stands at step 50, where it was saved."""
    at = {"checkpoints": (50,), "position": Position(50, 900, 600_000), "last_save": 50}
    return RunState(begun=True, started=True, started_with=config, **{**at, **fields})


def test_a_finished_run_is_over_until_a_length_goes_beyond_its_position() -> None:
    config = run("run.max_steps=50")
    finished = state(config, finished=True)
    assert decide(finished, config, "here").over
    ignored = decide(finished, run("run.max_steps=50", "optimizer.beta1=0.8"), "here")
    assert (ignored.over, ignored.ignored) == (True, ["optimizer.beta1"])
    assert decide(finished, run("run.max_steps=50", "run.folder=/elsewhere"), "here").ignored == []
    with pytest.raises(UserError, match="minka train 'moved there/x'"):
        decide(finished, run("run.max_steps=50", "run.seed=8"), "moved there/x")
    assert not decide(finished, run("run.max_steps=51"), "here").over
    assert not decide(state(config), config, "here").over  # it has yet to be exported
    lost = state(config, finished=True, position=None)  # the restore says why no checkpoint can be read
    assert not decide(lost, run("run.max_steps=51"), "here").over


def test_a_finished_run_becomes_longer_only_by_a_length_that_was_given() -> None:
    finished = state(run("run.max_steps=50"), finished=True)
    recipe = run()
    said = decide(finished, recipe, "here", given=["optimizer.beta1"])
    assert (said.over, said.longer) == (True, ("run.max_steps=420",))
    assert not decide(finished, recipe, "here", given=["run.max_steps"]).over
    by_tokens = run("run.max_tokens=10_000_000")
    assert decide(finished, by_tokens, "here", given=[]).longer == ("run.max_tokens=10000000",)
    shorter = decide(finished, run("run.max_steps=45"), "here", given=[])  # it had been made longer by an override
    assert (shorter.over, shorter.longer) == (True, ())
    with pytest.raises(UserError, match="is at step 50 already"):
        decide(finished, run("run.max_steps=45"), "here", given=["run.max_steps"])


def test_a_run_whose_checkpoints_are_all_gone_needs_a_person_unless_it_is_restarted_on_purpose() -> None:
    config = run()
    gone = state(config, checkpoints=(), position=None)
    with pytest.raises(UserError, match="all of them are gone") as caught:
        decide(gone, config, "runs/demo")
    assert caught.value.status == ExitStatus.NEEDS_PERSON
    assert "minka train runs/demo --from-scratch" in caught.value.remedy
    assert not decide(gone, config, "runs/demo", from_scratch=True).over
    assert not decide(gone.restarted(), config, "runs/demo").over
    assert not decide(state(config, checkpoints=(), position=None, last_save=None), config, "runs/demo").over


def test_a_start_that_cannot_be_read_is_refused_unless_the_run_is_restarted() -> None:
    unreadable = state(run(), unreadable_start="ledger.jsonl: the start event at byte 7 cannot be read: run.new")
    with pytest.raises(UserError, match="start event at byte 7") as caught:
        decide(unreadable, run(), "runs/demo")
    assert "--from-scratch" in caught.value.remedy
    decide(unreadable, run(), "runs/demo", from_scratch=True)


def test_a_run_state_is_handed_down_as_json_without_loss() -> None:
    there = state(run(recipe="llama3-8b"), in_file=run(), newest=50, tokens_before=7, ledger_bytes=8)
    assert RunState.model_validate(json.loads(json.dumps(there.model_dump(mode="json")))) == there


def walk(config: RunConfig, steps: int) -> tuple[int, int]:
    tokens = 0
    for _ in range(steps):
        tokens += config.batch_tokens_at(tokens)
    return steps, tokens


def remedied(error: UserError) -> str:
    """The override that a message offers, as a user would copy it."""
    tomllib.loads((override := error.remedy.split("'")[1]).removeprefix("data."))
    return override
