"""A run is a frozen value; what it derives is exact; every recipe is a run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from configs import SEQ, values
from minka.plan.config import RunConfig
from minka.plan.load_config import dump_toml, load_run, recipe_names, validate


def walk(config: RunConfig, step: int = 0, tokens: int = 0) -> tuple[int, int]:
    """Steps and tokens at a run's end, by taking each step: the definition that the closed form must meet."""
    while not config.finished(step, tokens):
        step, tokens = step + 1, tokens + config.batch_tokens_at(tokens)
    return step, tokens


@given(
    end=st.integers(1, 400),
    in_steps=st.booleans(),
    batch=st.integers(1, 9),
    stages=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 9)), max_size=4, unique_by=lambda stage: stage[0]),
)
def test_the_length_of_a_run_is_what_walking_it_gives(
    end: int, in_steps: bool, batch: int, stages: list[tuple[int, int]]
) -> None:
    warmup = [{"until_tokens": until, "batch_tokens": n * SEQ} for until, n in sorted(stages)]
    run = {"name": "x", "max_steps": end} if in_steps else {"name": "x", "max_tokens": end * 7}
    config = validate(values(data={"batch_tokens": batch * SEQ, "batch_warmup": warmup}) | {"run": run}, "a test")
    assert (config.total_steps, config.total_tokens) == walk(config)
    position = end // 2, end * 3  # reached with other settings
    assert config.end(*position) == walk(config, *position)


def test_the_batch_grows_with_the_tokens_consumed() -> None:
    config = load_run("llama3-405b").config
    at = config.batch_tokens_at
    assert [at(0), at(251_999_999), at(252_000_000), at(2_869_999_999_999), at(2_870_000_000_000)] == [
        4_194_304,
        4_194_304,
        8_388_608,
        8_388_608,
        16_777_216,
    ]


def test_the_horizon_is_in_the_schedules_unit() -> None:
    steps = validate(values(), "a test")
    tokens = validate(values(schedule={"unit": "tokens"}), "a test")
    assert (steps.horizon, tokens.horizon) == (10, 10 * 4 * SEQ)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_run_under_its_own_name_and_survives_toml(name: str, tmp_path: Any) -> None:
    config = load_run(name).config
    assert config.run.name == name
    assert config.schedule.warmup < config.horizon
    written = tmp_path / "run.toml"
    written.write_text(dump_toml(config))
    assert load_run(str(written)).config == config


def test_the_recipes_are_those_the_documentation_promises() -> None:
    promised = "demo dense-125m dense-1b dense-350m llama3-405b llama3-70b llama3-8b"
    assert recipe_names() == sorted(promised.split())


def test_a_run_cannot_be_changed() -> None:
    config = load_run("demo").config
    sections = [getattr(config, name) for name in RunConfig.model_fields if name != "format"]
    for value in (config, *sections):
        field = next(iter(type(value).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, field, getattr(value, field))


def test_every_model_of_the_configuration_refuses_unknown_keys() -> None:
    for model in every_model(RunConfig):
        assert model.model_config.get("extra") == "forbid", model
        assert model.model_config.get("frozen") is True, model


def every_model(model: type[BaseModel]) -> list[type[BaseModel]]:
    """`model` and the models of its fields, at any depth."""
    schema = model.model_json_schema()
    names = set(schema.get("$defs", {})) | {model.__name__}
    found, todo = {model.__name__: model}, list(BaseModel.__subclasses__())
    while todo:
        candidate = todo.pop()
        todo += candidate.__subclasses__()
        if candidate.__name__ in names and candidate.__module__.startswith("minka.plan"):
            found[candidate.__name__] = candidate
    assert set(found) == names
    return list(found.values())
