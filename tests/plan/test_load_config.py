"""Wrong input is refused with field, value, reason, the nearest right name, and what would work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import values
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.load_config import dump_toml, flatten, load_run, validate
from minka.plan.run_folder import RunFolder, find_run

BAD: list[tuple[dict[str, dict[str, Any]], list[str]]] = [  # what is given, what the refusal must say
    ({"run": {"max_steps": 0}}, ["run.max_steps=0", "greater than or equal to 1"]),
    ({"run": {"max_steps": 5, "max_tokens": 5}}, ["run", "exactly one of run.max_steps and run.max_tokens"]),
    ({"run": {"max_steps": None}}, ["exactly one of run.max_steps and run.max_tokens"]),
    ({"run": {"name": "a/b"}}, ["run.name='a/b'", "letters, digits, dots"]),
    ({"model": {"tied": "yes"}}, ["model.tied='yes'", "must be true or false"]),
    ({"data": {"dropped_samples": 5}}, ["data.dropped_samples=5", "must be a list"]),
    ({"run": {"seed": -1}}, ["run.seed=-1"]),
    ({"model": {"heads": 6, "kv_heads": 4}}, ["model", "kv_heads must divide heads=6", "[1, 2, 3, 6]"]),
    ({"model": {"head_dim": 3}}, ["model.head_dim=3", "multiple of 2"]),
    ({"model": {"layers": 1.5}}, ["model.layers=1.5", "integer"]),
    ({"model": {"vocab": 100}}, ["model.vocab=100", "256"]),
    ({"model": {"vocab": 512}}, ['data.tokenizer="bytes" has 256 entries', "model.vocab is 512"]),
    ({"model": {"d_modle": 8}}, ["model.d_modle is not a setting", "did you mean model.d_model?"]),
    ({"model": {"max_positions": 4}}, ["data.seq_len=8", "model.max_positions=4"]),
    ({"model": {"rope_scaling": {"factor": 0.5}}}, ["model.rope_scaling.factor=0.5"]),
    ({"model": {"rope_scaling": {"high_freq_factor": 1.0}}}, ["high_freq_factor must be above low_freq_factor"]),
    ({"data": {"batch_tokens": 20}}, ["batch_tokens=20 is not a multiple of seq_len=8", "[16, 24]"]),
    ({"data": {"batch_tokens": 5}}, ["batch_tokens=5", "[8]"]),
    ({"data": {"batch_warmup": [{"until_tokens": 9, "batch_tokens": 9}]}}, ["batch_warmup[0].batch_tokens=9"]),
    (
        {"data": {"batch_warmup": [{"until_tokens": n, "batch_tokens": 8} for n in (9, 9)]}},
        ["batch_warmup must be in rising order"],
    ),
    ({"data": {"source": "parquet"}}, ['source="parquet" needs paths']),
    ({"data": {"source": "text", "paths": ["a", " "]}}, ["none of them empty"]),  # $CORPUS was not set
    ({"data": {"source": "datasets"}}, ['source="datasets" needs dataset']),
    ({"data": {"source": "pdf"}}, ["data.source='pdf'", "'stdlib', 'text', 'jsonl', 'parquet' or 'datasets'"]),
    ({"data": {"validation_fraction": 1.0}}, ["data.validation_fraction=1.0", "less than 1"]),
    ({"data": {"dropped_samples": [[5, 3]]}}, ["dropped_samples must be rising"]),
    ({"data": {"dropped_samples": [[0, 4], [3, 6]]}}, ["dropped_samples must be rising"]),
    ({"optimizer": {"learning_rate": 0.0}}, ["optimizer.learning_rate=0.0", "greater than 0"]),
    ({"optimizer": {"learning_rate": "fast"}}, ["optimizer.learning_rate='fast'", "number"]),
    ({"optimizer": {"betas": [0.9, 0.95]}}, ["optimizer.betas is not a setting", "did you mean optimizer.beta"]),
    ({"schedule": {"warmup": 10}}, ["schedule.warmup=10 takes all of a run of 10 steps", "give 9 or less"]),
    ({"schedule": {"kind": "cosin"}}, ["schedule.kind='cosin'", "'cosine'"]),
    ({"layout": {"tensor": 3}}, ["layout.tensor", "tensor=3 does not divide", "tensor in [1"]),
    ({"checkpoint": {"keep": 0}}, ["checkpoint.keep=0"]),
    ({"guard": {"hang_seconds": 0}}, ["guard.hang_seconds=0"]),
    ({"plan": {"loss": 0}}, ["plan.loss=0"]),
    ({"eval": {"temperature": -1}}, ["eval.temperature=-1"]),
    ({"tracking": {"wandb": "yes"}}, ["tracking.wandb='yes'", "'off', 'offline' or 'online'"]),
    (
        {"kernels": {"attention": "flash"}},
        ["kernels.attention='flash'", "'auto', 'sdpa', 'varlen', 'flex', 'triton' or 'flash-attn'"],
    ),
    ({"shedule": {"warmup": 1}}, ["shedule is not a setting", "did you mean schedule?"]),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_value_is_refused_with_field_value_and_reason(given: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        validate(values(**given), "run.toml")
    assert refusal.value.status is ExitStatus.REFUSED
    assert all(word in str(refusal.value) for word in said), str(refusal.value)
    assert refusal.value.remedy


def test_every_section_has_a_bad_value_in_this_file() -> None:
    """So that a new section cannot come without its refusals."""
    assert set(RunConfig.model_fields) - {"format"} <= {name for given, _ in BAD for name in given}


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        validate(values(run={"seed": -1}, optimizer={"learning_rate": -1}), "run.toml")
    assert {"run.seed=-1", "optimizer.learning_rate=-1"} <= set(str(refusal.value).replace(":", "").split())


@pytest.mark.parametrize("section", ["run", "model", "data", "optimizer"])
def test_a_missing_section_is_named(section: str) -> None:
    given = values()
    del given[section]
    with pytest.raises(UserError, match=f"{section} is missing"):
        validate(given, "run.toml")


def test_a_missing_value_is_named() -> None:
    given = values()
    del given["model"]["d_ff"]
    with pytest.raises(UserError, match=r"model\.d_ff is missing"):
        validate(given, "run.toml")


def test_another_format_is_refused() -> None:
    with pytest.raises(UserError, match="format=2"):
        validate(values() | {"format": 2}, "run.toml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("run.name=other", "run.name", "other"),
        ('run.name="quoted"', "run.name", "quoted"),
        ("model.tied=false", "model.tied", False),
        ("run.max_steps=1_000", "run.max_steps", 1000),
        ('eval.prompts=["a", "b"]', "eval.prompts", ("a", "b")),
        ("model.rope_scaling.factor=4.0", "model.rope_scaling.factor", 4.0),
        ("data.store=here", "data.store", "here"),
        ("run.name=2026", "run.name", "2026"),
        ("data.paths=corpus", "data.paths", ("corpus",)),
    ],
)
def test_an_override_sets_one_field_and_is_reported(override: str, key: str, value: object) -> None:
    plain, loaded = load_run("demo").config, load_run("demo", [override])
    assert flatten(loaded.config.model_dump())[key] == value
    assert list(loaded.changed) == [key]
    section, *rest = key.split(".")
    same = [name for name in RunConfig.model_fields if name != section]
    assert [getattr(loaded.config, name) for name in same] == [getattr(plain, name) for name in same]
    assert rest


def test_an_override_that_changes_nothing_is_not_reported() -> None:
    assert load_run("demo", ["data.store=", "data.seq_len=256"]).changed == {}


def test_an_override_reports_the_value_before() -> None:
    loaded = load_run("demo", ["run.max_steps=70", "guard.max_refused_steps=3"])
    recipe = load_run("demo").config
    assert loaded.changed == {
        "run.max_steps": (recipe.run.max_steps, 70),
        "guard.max_refused_steps": (recipe.guard.max_refused_steps, 3),
    }


def test_the_last_override_of_a_field_wins() -> None:
    assert load_run("demo", ["run.seed=1", "run.seed=2"]).config.run.seed == 2


def test_max_tokens_replaces_max_steps_and_the_other_way_round() -> None:
    config = load_run("demo", ["run.max_tokens=1_000_000"]).config
    assert (config.run.max_steps, config.run.max_tokens) == (None, 1_000_000)
    config = load_run("dense-125m", ["run.max_steps=5", "schedule.unit=steps", "schedule.warmup=1"]).config
    assert (config.run.max_steps, config.run.max_tokens) == (5, None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimiser.learning_rate=1",
            ["optimiser.learning_rate is not a setting", "did you mean optimizer.learning_rate?"],
        ),
        ("learning_rate=1", ["learning_rate is not a setting", "did you mean optimizer.learning_rate?"]),
        ("model.d_modle=1", ["did you mean model.d_model?"]),
        ("run.max_steps", ["'run.max_steps' is not an override", "section.key=value"]),
        ("=3", ["'=3' is not an override"]),
        ("model=3", ["model is not a setting"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate='fast'"]),
        ("data.paths=[a", ["override data.paths=[a: not TOML", """'data.paths=["a", "b"]'"""]),
        ("data.paths=[corpus/a.txt]", ["override data.paths=[corpus/a.txt]: not TOML", """'data.paths=["a", "b"]'"""]),
        ('data.text_field="doc', ["not TOML", """'data.text_field="a b"'"""]),
        ("model.rope_scaling={factor", ["not TOML", "'model.rope_scaling={ factor = 8.0 }'"]),
    ],
)
def test_a_bad_override_is_refused_with_the_nearest_right_one(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load_run("demo", [override])
    assert all(word in str(refusal.value) for word in said), str(refusal.value)


def test_a_mistaken_override_is_named_before_all_else(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        load_run("demo", ["run.max_steps=8", "model.layers=1.5", "run.seed=3"])
    assert str(refusal.value).startswith("command line: model.layers=1.5: ")
    assert "run.max_steps" not in str(refusal.value)
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nname = 1\n")
    with pytest.raises(UserError) as refusal:
        load_run(str(path), ["run.max_steps=8", "guard.hang_seconds=0"])
    assert str(refusal.value).startswith(f"{path}: guard.hang_seconds=0: ")
    assert "run.name=1: " in refusal.value.what


def test_a_combination_of_an_override_and_the_recipe_is_the_overrides() -> None:
    with pytest.raises(UserError) as refusal:
        load_run("demo", ["model.kv_heads=3"])
    assert refusal.value.where == "command line, model.kv_heads"


@pytest.mark.parametrize("find", [load_run, find_run])
def test_what_is_not_a_run_is_said(find: Callable[[str], object]) -> None:
    for override in ("kernels.implementation=triton", "kernel.x=1"):
        with pytest.raises(UserError, match=f"{override}' is an override, and a run must come first"):
            find(override)
    with pytest.raises(UserError, match=r"'runs/d@30' names a step, and a run is wanted here. leave out @30: runs/d"):
        find("runs/d@30")


def test_a_run_is_found_as_recipe_file_folder_and_name(tmp_path: Path) -> None:
    config = load_run("demo", ["run.name=mine"]).config
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(dump_toml(config))
    for source in (str(folder), str(folder / "run.toml"), "mine"):
        assert load_run(source, runs=str(tmp_path / "runs")).config == config


def test_an_unknown_source_names_the_nearest_recipe() -> None:
    with pytest.raises(UserError) as refusal:
        load_run("llama-8b")
    assert "'llama3-8b'" in refusal.value.why
    assert "dense-125m" in refusal.value.remedy


@pytest.mark.parametrize(("text", "said"), [("a = [", "cannot be read"), ("[run]\nname = 1\n", "run.name=1")])
def test_a_file_that_is_wrong_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_run(str(path))
    assert refusal.value.where == str(path)
    assert said in refusal.value.what


def test_a_run_is_where_it_lies_even_when_it_was_moved_or_copied(tmp_path: Path) -> None:
    began = load_run("demo", ["run.name=began", f"run.folder={tmp_path / 'runs'}"]).config
    copy = tmp_path / "elsewhere" / "copied"
    copy.mkdir(parents=True)
    (copy / "run.toml").write_text(dump_toml(began))
    assert load_run(str(copy)).config.run.name == "began"  # a file like any other: nobody has run anything here
    (copy / "provenance.json").write_text("{}")
    for source in (copy, copy / "run.toml"):
        run = load_run(str(source)).config.run
        assert (run.name, run.folder) == ("copied", str(tmp_path / "elsewhere"))
    forked = load_run(str(copy), ["run.name=fork"]).config.run
    assert (forked.name, forked.folder) == ("fork", str(tmp_path / "elsewhere"))


def test_who_starts_from_another_does_not_inherit_how_the_file_did(tmp_path: Path) -> None:
    file = tmp_path / "child.toml"
    file.write_text(dump_toml(load_run("demo", ["run.start_from=a", "run.start_with=all"]).config))
    assert load_run(str(file)).config.run.start_with == "all"
    assert load_run(str(file), ["run.start_from=b"]).config.run.start_with == "weights"
    assert load_run(str(file), ["run.start_with=all", "run.start_from=b"]).config.run.start_with == "all"


def test_a_run_that_is_not_there_lists_the_runs_that_are(tmp_path: Path) -> None:
    for name in ("small", "big"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.toml").touch()
    with pytest.raises(UserError, match=r"did you mean 'small'\?.*runs here: big, small; recipes: demo") as refusal:
        load_run("runs/smal", (), str(tmp_path))
    assert refusal.value.status is ExitStatus.REFUSED


def test_what_the_user_gave_are_overrides_and_all_of_the_runs_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run("demo").given == frozenset()
    assert load_run("demo", ["run.max_steps=50", "run.seed=1"]).given == {"run.max_steps", "run.seed"}
    config = load_run("demo").config
    RunFolder.of(config).create(config, {})
    assert "run.max_steps" in load_run("runs/demo").given
    assert "run.max_steps" in load_run(str(tmp_path / "runs" / "demo" / "run.toml")).given
    assert load_run("runs/demo", ["run.name=other"]).given == {"run.name"}  # a different run's file
