"""Loads TOML and overrides into one RunConfig, or raises one error with field, value, reason and remedy."""

import difflib
import json
import os
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.read_file import MALFORMED, reading

RECIPES = Path(__file__).parent / "recipes"
# What pydantic says in the terms of its own types.
WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_pattern_mismatch": "only letters, digits, dots, hyphens and underscores, beginning with a letter or digit",
    "tuple_type": 'must be a list, for example ["a", "b"] or [[0, 8]]',
}
PROVENANCE = "provenance.json"  # next to a run.toml, it marks the folder of a run


class LoadedRun(NamedTuple):
    """A resolved run and its overridden values: "section.key" -> (value before, value given)."""

    config: RunConfig
    changed: dict[str, tuple[object, object]]
    source: str
    given: frozenset[str]  # keys that the user gave for this run: as overrides, or in its own run.toml


def recipe_names() -> list[str]:
    """Recipes that come with minka."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def run_names(runs: str = "runs") -> list[str]:
    """Runs in the folder `runs`."""
    return sorted(path.parent.name for path in Path(runs).glob("*/run.toml"))


def load_run(source: str, overrides: Sequence[str] = (), runs: str = "runs") -> LoadedRun:
    """Load a run from a recipe's name, a TOML file, a run folder or a name under `runs`. Raises UserError."""
    path = find_source(source, runs)
    with reading(path, "", *MALFORMED, remedy="it must be a TOML file"):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    if path.name == "run.toml" and (path.parent / PROVENANCE).is_file() and isinstance(values.get("run"), dict):
        # The folder names the run, whatever it was called at first: it may have been moved, or be a copy.
        place = path.parent if path.parent.name not in ("", "..") else Path(os.path.abspath(path.parent))
        values["run"] |= {"name": place.name, "folder": str(place.parent)}
    before, known, changed = flatten(values), dict(_settings(RunConfig)), {}
    given = {override.partition("=")[0] for override in overrides}
    if "run.start_from" in given and "run.start_with" not in given:
        values.get("run", {}).pop("start_with", None)  # the file's value belongs to a different parent
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            remedy = "write section.key=value: for example run.max_steps=100 or data.source=stdlib"
            raise UserError(f"{override!r} is not an override", remedy=remedy)
        if key not in known:
            raise UserError(_unknown(key, known), where=f"override {override!r}", remedy="keys are written section.key")
        value = _value(known[key], key, text)
        _put(values, key, value)
        old = before.get(key, None if known[key].is_required() else known[key].get_default(call_default_factory=True))
        if old != value:
            changed[key] = (old, value)
    config = validate(values, str(path), given)
    own = path.absolute() == (Path(config.run.folder) / config.run.name / "run.toml").absolute()
    return LoadedRun(config, changed, str(path), frozenset(given | before.keys() if own else given))


def find_source(source: str, runs: str = "runs") -> Path:
    """The TOML file that `source` means: a file, a run's folder, a recipe, or a name under `runs`, in this order.

    A recipe's name always means the recipe, even where a run has that name. Raises UserError with the nearest recipe.
    """
    given = Path(source)
    places = (given / "run.toml", RECIPES / f"{source}.toml", Path(runs) / source / "run.toml")
    for candidate in (given, *places) if given.suffix == ".toml" else places:
        if candidate.is_file():
            return candidate
    check_means_run(source)
    recipes, here = recipe_names(), run_names(runs)
    near = difflib.get_close_matches(given.name, [*here, *recipes], n=1)
    if given.is_dir():
        raise UserError("this folder has no run.toml that can be read", where=str(given / "run.toml"))
    what, why = f"there is no run, TOML file or recipe called {source!r}", f"did you mean {near[0]!r}?" if near else ""
    listed = [f"{kind}: {', '.join(names)}" for kind, names in (("runs here", here), ("recipes", recipes)) if names]
    raise UserError(what, why=why, remedy=f"{'; '.join(listed)}; or give a path to a .toml file or a run folder")


def check_means_run(source: str) -> None:
    """Raise UserError where `source`, which no run is called, is an override, or RUN@STEP where a run is wanted."""
    name, _, step = source.rpartition("@")
    if name and step.isdecimal():
        raise UserError(f"{source!r} names a step, and a run is wanted here", remedy=f"leave out @{step}: {name}")
    key, equals, _ = source.partition("=")
    if equals and key and "/" not in key:
        what = f"{source!r} is an override, and a run must come first"
        raise UserError(what, remedy=f"for example: demo {source}")


def dump_toml(config: RunConfig) -> str:
    """Every value of the run as TOML; `load_run` gives an equal RunConfig. None (not set) is left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested tables as "section.key" -> value."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def validate(values: dict[str, Any], where: str, overridden: Collection[str] = ()) -> RunConfig:
    """A RunConfig, or a UserError with a line for each field that is wrong, those in `overridden` first."""
    try:
        config = RunConfig.model_validate_json(json.dumps(values, default=str))  # strict, but takes lists
    except ValidationError as error:
        problems = [(_keys_of(problem, overridden), problem) for problem in error.errors()]
        problems.sort(key=lambda one: not one[0])
        what = "; ".join(_explain(problem) for _, problem in problems)
        if all(keys for keys, _ in problems):
            wider = sorted({key for keys, problem in problems for key in keys if _place(problem) != key})
            where = ", ".join(["command line", *wider])
        remedy = "docs/configuration.md lists every setting and its values"
        raise UserError(what, where=where, remedy=remedy) from None
    config.check()
    return config


def _keys_of(problem: Any, overridden: Collection[str]) -> list[str]:
    """The overrides that have set the wrong field, a part of it, or something in the table that is wrong."""
    place = _place(problem)
    return [key for key in overridden if f"{key}.".startswith(f"{place}.") or f"{place}.".startswith(f"{key}.")]


def describe_problems(error: ValidationError) -> str:
    """Each field that is wrong, with its value and the reason, in one line."""
    return "; ".join(_explain(problem) for problem in error.errors())


def _value(field: FieldInfo, key: str, text: str) -> object:
    """The value after the equals sign: TOML, a bare word, or none where the setting may be unset.

    For a list, a single value means a list of one.
    Raises UserError for a list, table or string that is not TOML: most often, the shell has removed its quotes.
    """
    if text == "none" and type(None) in get_args(field.annotation):
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            is_list = get_origin(field.annotation) is tuple
            example = '["a", "b"]' if is_list else '"a b"' if text[0] in "\"'" else "{ factor = 8.0 }"
            remedy = f"quote all of it for the shell: '{key}={example}'"
            raise UserError(f"not TOML: {error}", where=f"override {key}={text}", remedy=remedy) from None
        value = text
    if field.annotation is str and not isinstance(value, str):
        return text  # run.name=2026
    return [value] if get_origin(field.annotation) is tuple and not isinstance(value, list) else value


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"{table} is {values!r} in the file, and must be a table for {key}")
    # Only one of the two may be set: the override replaces the value in the file.
    if key in ("run.max_steps", "run.max_tokens"):
        values.pop("max_tokens" if last == "max_steps" else "max_steps", None)
    values[last] = value


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that an override may have, with its field; a table that is optional may also be given whole."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if name == "batch_warmup" or not sections:
            yield prefix + name, field
            continue
        yield from _settings(sections[0], f"{prefix}{name}.")
        if prefix:
            yield prefix + name, field


def _unknown(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"{key} is not a setting" + (f"; did you mean {near[0]}?" if near else "")


def _place(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"])


def _explain(problem: Any) -> str:
    place = _place(problem)
    if problem["type"] == "extra_forbidden":
        return _unknown(place, [*dict(_settings(RunConfig)), *RunConfig.model_fields])
    if problem["type"] == "missing":
        return f"{place} is missing"
    reason = WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "value_error":
        return f"{place}: {reason}" if place else reason
    return f"{place}={problem['input']!r}: {reason[0].lower()}{reason[1:]}"
