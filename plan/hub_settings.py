"""The settings of a Hugging Face config.json: each is checked when it is read, or the family's default."""

import json
from collections.abc import Mapping
from typing import Any

from minka.plan.errors import UserError
from minka.plan.hub_defaults import ALIASES, DEFAULTS, FAMILIES

LARGEST = 2**31 - 1  # of a size: the counts of all that is smaller are finite
LONGEST_SHOWN = 60  # characters of a wrong value


class HubSettings:
    """The settings of one text model, by their usual names.

    `assumed` collects the sizes and true flags that were read, and that config.json leaves to transformers' defaults.
    """

    def __init__(self, family: str, values: Mapping[str, Any], where: str) -> None:
        self.family, self.where = family, where
        self.stated: dict[str, Any] = {}
        self.assumed: dict[str, Any] = {}
        self._written: dict[str, str] = {}  # as config.json calls it
        aliases = ALIASES.get(family, {})
        for key, value in values.items():
            usual = aliases.get(key, key)
            if usual in self.stated and self.stated[usual] != value:
                what = f"{self._written[usual]} is {_shown(self.stated[usual])} and {key} is {_shown(value)}"
                why = "they are two names of one setting"
                raise UserError(what, where=where, why=why, remedy="keep the one that is right")
            self.stated[usual], self._written[usual] = value, key

    def has(self, key: str) -> bool:
        """Whether the family's model has this setting."""
        return key in DEFAULTS[self.family]

    def get(self, key: str) -> Any:
        """A setting as it is, None where it is null or follows from other settings."""
        if key in self.stated:
            return self.stated[key]
        default = DEFAULTS[self.family].get(key)
        if default:
            self.assumed[key] = default
        return default

    def size(self, key: str, least: int = 1, most: int = LARGEST, why: str = "") -> int:
        """An integer from `least` to `most`. Raises UserError for anything else, null included."""
        value = self.get(key)
        if type(value) is not int or value < least:
            raise self.wrong(key, f"not an integer above {least - 1}" if least else "not an integer of 0 or more", why)
        if value > most:
            raise self.wrong(key, f"above {most:,}", why)
        return value

    def optional_size(self, key: str, least: int = 1) -> int | None:
        """The same, or None where it is null or follows from other settings."""
        return None if self.get(key) is None else self.size(key, least)

    def flag(self, key: str) -> bool:
        """True or false. Raises UserError for anything else."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "not true or false")
        return value

    def asks(self, key: str) -> bool:
        """The same, and false where the family's model does not have it."""
        return self.has(key) and self.flag(key)

    def items(self, key: str, kind: type[int] | type[str], length: int | None = None) -> list[Any]:
        """A list of integers or strings, of `length` where it is given; empty where it is null or missing."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.wrong(key, f"not a list of {'integers' if kind is int else 'strings'}")
        if length is not None and len(value) != length:
            raise self.wrong(key, f"a list of {len(value)}", f"the model has {length} layers")
        return value

    def wrong(self, key: str, reason: str, why: str = "") -> UserError:
        """The refusal of a setting."""
        written = self._written.get(key, key)
        name = key if written == key else f"{written} ({key})"
        of = "" if key in self.stated else " by default"
        value = self.stated.get(key, DEFAULTS[self.family].get(key))
        remedy = f"{'correct' if key in self.stated else 'add'} {written}"
        return UserError(f"{name} is {_shown(value)}{of}, {reason}", where=self.where, why=why, remedy=remedy)


def text_settings(values: Mapping[str, Any], where: str) -> tuple[HubSettings, list[str]]:
    """The settings of a config.json's text model, and what else the config describes.

    Raises UserError for an unknown family, and for a config that states no size and is not a part of a larger one.
    """
    text = values.get("text_config")
    if text is not None:
        inner = _inner(values, text, where)
        left_out = f"all but the text model of this {values.get('model_type') or 'model'}"
        return HubSettings(family_in(inner, where), inner, where), [left_out]
    settings = HubSettings(family_in(values, where), values, where)
    if not any(key in settings.stated for key in ("hidden_size", "num_hidden_layers", "intermediate_size")):
        what = "hidden_size, num_hidden_layers and intermediate_size are missing"
        why = f"every size would be the default of transformers' {settings.family}"
        raise UserError(what, where=where, why=why, remedy="give a model's config.json")
    return settings, []


def _inner(values: Mapping[str, Any], text: Any, where: str) -> dict[str, Any]:
    """The settings in text_config, with what is stated for the whole model."""
    if not isinstance(text, dict):
        raise UserError(f"text_config is {_shown(text)}, not a table of settings", where=where, remedy="correct it")
    key, whole = "tie_word_embeddings", values.get("model_type")
    inner = {**text, "model_type": text.get("model_type") or (f"{whole}_text" if whole else None)}
    if key in values and inner.setdefault(key, values[key]) != values[key]:
        what = f"{key} is {_shown(values[key])}, and {_shown(text[key])} in text_config"
        why = "versions of transformers differ in which they take"
        raise UserError(what, where=where, why=why, remedy="keep the one that is right")
    return inner


def family_in(values: Mapping[str, Any], where: str) -> str:
    """The family that a config.json names. Raises UserError for one that cannot be counted."""
    named, architectures = values.get("model_type"), values.get("architectures")
    if named is not None and not isinstance(named, str):
        what = f"model_type is {_shown(named)}, not a string"
        raise UserError(what, where=where, remedy="give the family's name, such as llama")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(one, str) for one in architectures)
    ):
        what = f"architectures is {_shown(architectures)}, not a list of strings"
        raise UserError(what, where=where, remedy='give it as ["LlamaForCausalLM"]')
    classes = architectures or []
    family = named or next((name for name, known in FAMILIES.items() if known.architecture in classes), None)
    if family is None and not classes:
        what = "model_type is missing"
        raise UserError(what, where=where, remedy=f"give a model's config.json; known: {', '.join(FAMILIES)}")
    if family not in FAMILIES:
        raise unknown_family(family or ", ".join(classes), where, "count", FAMILIES)
    return str(family)


def unknown_family(name: object, where: str, done: str, known: Mapping[str, object]) -> UserError:
    """The refusal of a family."""
    what = f"{name!r} is not an architecture that minka can {done}"
    return UserError(what, where=where, remedy=f"known: {', '.join(known)}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
