"""`minka plan model`: how many weights a model has, and what a token costs to train on, by every convention."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minka.plan.errors import UserError
from minka.plan.flops import FORMULAS, Shape, active_parameters, parameters, training_flops_per_token
from minka.plan.hub_family import TRAINED
from minka.plan.hub_shape import read_shape
from minka.plan.load_config import load_run
from minka.plan.read_file import read_json

NEEDED = ("layers", "d_model", "heads", "d_ff", "vocab")
SHAPE_KEYS = (*NEEDED, "kv_heads", "head_dim", "tied", "qk_norm")
DEFAULT_SEQ_LEN = 2048


def model_plan(shape: Shape, seq_len: int, *, uncounted: Sequence[str] = (), trainable: bool = True) -> dict[str, Any]:
    """The counts of a shape, under the keys of the JSON."""
    if seq_len < 1:
        raise UserError(f"a sequence of {seq_len} tokens", where="--seq", remedy="give 1 or more")
    return {
        "shape": {field.name: getattr(shape, field.name) for field in fields(shape)},
        "seq_len": seq_len,
        "parameters": parameters(shape),
        "parameters_embedding": shape.embedding_parameters,
        "parameters_non_embedding": parameters(shape) - shape.embedding_parameters,
        "parameters_active": active_parameters(shape),
        "training_flops_per_token": {name: training_flops_per_token(shape, seq_len, name) for name in FORMULAS},
        "uncounted": list(uncounted),
        "trainable": trainable,
    }


def of_words(words: Sequence[str]) -> Shape:
    """A shape from layers=32 d_model=4096 ... Raises UserError for words that are none, and for sizes that are missing.

    kv_heads is heads and head_dim is d_model / heads unless they are given.
    """
    known: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or key not in SHAPE_KEYS:
            what, remedy = f"{word!r} is not a size of a model", f"give some of {', '.join(SHAPE_KEYS)}, as layers=32"
            raise UserError(what, where="minka plan model", remedy=remedy)
        known[key] = _value(key, value)
    missing = [key for key in NEEDED if key not in known]
    if missing:
        raise UserError(f"{', '.join(missing)} missing", where="minka plan model", remedy=f"add {missing[0]}=...")
    heads, d_model = known["heads"], known["d_model"]
    if "head_dim" not in known and d_model % heads:
        what = f"d_model={d_model} is not a multiple of heads={heads}"
        raise UserError(what, where="minka plan model", remedy="add head_dim=...")
    if heads % known.get("kv_heads", heads):
        what = f"kv_heads={known['kv_heads']} does not divide heads={heads}"
        raise UserError(what, where="minka plan model", remedy="give a divisor of heads")
    return Shape(**{"kv_heads": heads, "head_dim": d_model // heads, **known})


def _value(key: str, text: str) -> int | bool:
    if key in ("tied", "qk_norm"):
        if text in ("true", "false"):
            return text == "true"
        raise UserError(f"{key}={text!r} is not true or false", where="minka plan model", remedy=f"give {key}=true")
    number = text.replace("_", "")
    if not (number.isascii() and number.isdecimal() and int(number)):
        raise UserError(f"{key}={text!r} is not an integer above 0", where="minka plan model", remedy="correct it")
    return int(number)


def of_config(path: Path, seq_len: int | None) -> dict[str, Any]:
    """The counts of a Hugging Face config.json, or of the folder that holds one."""
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file, remedy="give a config.json, or the folder of a Hugging Face model")
    if not isinstance(values, Mapping):
        raise UserError("this is not a table of settings", where=str(file), remedy="give a model's config.json")
    shape, uncounted = read_shape(values, str(file))
    longest = values.get("max_position_embeddings")
    found = model_plan(
        shape,
        seq_len or (longest if isinstance(longest, int) else DEFAULT_SEQ_LEN),
        uncounted=uncounted,
        trainable=values.get("model_type") in TRAINED and not uncounted and not shape.windowed_layers,
    )
    if isinstance(longest, int) and seq_len and seq_len > longest:
        found["note"] = f"the model's positions end at {longest:,}"
    return found


def of_recipe(name: str, seq_len: int | None) -> dict[str, Any]:
    """The counts of a recipe's, a run file's or a run's model, by default at its own sequence length."""
    config = load_run(name).config
    if seq_len and seq_len > config.model.max_positions:
        what = f"a sequence of {seq_len:,} tokens is longer than model.max_positions={config.model.max_positions:,}"
        raise UserError(what, where="--seq", remedy=f"give {config.model.max_positions} or less")
    return model_plan(Shape.of(config.model), seq_len or config.data.seq_len)


def model_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people: what, how many, how it is counted."""
    per_token = found["training_flops_per_token"]
    rows = [
        ["parameters", f"{found['parameters']:,}", ""],
        ["  of embedding and head", f"{found['parameters_embedding']:,}", ""],
        ["  without those", f"{found['parameters_non_embedding']:,}", ""],
        ["  that a token passes through", f"{found['parameters_active']:,}", ""],
    ]
    rows += [[f"training FLOPs a token, {name}", f"{per_token[name]:.5g}", FORMULAS[name]] for name in FORMULAS]
    rows.append(["  at a sequence of", f"{found['seq_len']:,}", "tokens"])
    rows += [["not counted", "", what] for what in found["uncounted"]]
    if not found["trainable"]:
        rows.append(["can be trained here", "no", "its architecture is counted only"])
    return rows


def shape_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """The counts as plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda latent: vars(latent)))
    return plain
