"""`minka plan model`: how many weights a model has, and what a token costs to train on, by every convention."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError
from minka.plan.flops import (
    FORMULAS,
    SHARED,
    SYMBOLS,
    Shape,
    active_parameters,
    formula_of,
    parameters,
    symbols_of,
    training_flops_per_token,
)
from minka.plan.hub_config import from_config
from minka.plan.hub_settings import LARGEST, text_settings
from minka.plan.hub_shape import shape_of
from minka.plan.load_config import describe_problems, load_run
from minka.plan.read_file import read_json

NEEDED = ("layers", "d_model", "heads", "d_ff", "vocab")
FLAGS = ("tied", "qkv_bias", "qk_norm")
SHAPE_KEYS = (*NEEDED, "kv_heads", "head_dim", *FLAGS)
DEFAULT_SEQ_LEN = 2048
HERE = "minka plan model"
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(?<!\.json)")


class Origin(NamedTuple):
    """What is known of a model besides its shape."""

    positions: int = 0  # that it has; 0: not known
    defaults: Mapping[str, Any] = {}  # settings of a config.json that it leaves to transformers
    uncounted: Sequence[str] = ()
    refused: str = ""  # why it cannot be trained here


def model_plan(shape: Shape, seq_len: int, origin: Origin) -> dict[str, Any]:
    """The counts of a shape, under the keys of the JSON. Raises UserError for a sequence that the model cannot have."""
    if not 1 <= seq_len <= LARGEST:
        raise UserError(f"a sequence of {seq_len} tokens", where="--seq", remedy=f"give 1 to {LARGEST:,}")
    return {
        "shape": _shape_json(shape),
        "seq_len": seq_len,
        "parameters": parameters(shape),
        "parameters_embedding": shape.embedding_parameters,
        "parameters_non_embedding": parameters(shape) - shape.embedding_parameters,
        "parameters_active": active_parameters(shape),
        "training_flops_per_token": {name: training_flops_per_token(shape, seq_len, name) for name in FORMULAS},
        "formulas": {name: formula_of(shape, seq_len, name) for name in FORMULAS},
        "symbols": symbols_of(shape, seq_len),
        "uncounted": list(origin.uncounted),
        "defaults": dict(origin.defaults),
        "note": _note(shape, seq_len, origin.positions),
        "trainable": not origin.refused,
        "not_trainable_because": origin.refused or None,
    }


def _shape_json(shape: Shape) -> dict[str, Any]:
    """Latent attention has three widths of its own, and none that all of a head has."""
    return asdict(shape) | ({"head_dim": None} if shape.latent else {})


def _note(shape: Shape, seq_len: int, positions: int) -> str | None:
    """RoPE can rotate to any position, so a longer sequence is counted with a note; a learned position is a weight."""
    if not positions or seq_len <= positions:
        return None
    if shape.learned_positions:
        what = f"a sequence of {seq_len:,} tokens is longer than the {positions:,} positions that the model has learned"
        raise UserError(what, where="--seq", remedy=f"give {positions} or less")
    return f"the model's positions end at {positions:,}, before the end of a sequence of {seq_len:,}"


def of_words(words: Sequence[str], seq_len: int | None) -> dict[str, Any]:
    """The counts of layers=32 d_model=4096 ... Raises UserError for a word that is not a size, and for missing sizes.

    kv_heads is heads and head_dim is d_model / heads unless they are given.
    """
    known: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or key not in SHAPE_KEYS:
            raise _unknown_size(word, key)
        if key in known:
            raise UserError(f"{key} is given twice", where=HERE, remedy=f"keep one {key}=...")
        known[key] = _value(key, value)
    if missing := [key for key in NEEDED if key not in known]:
        remedy = f"add {' '.join(f'{key}=...' for key in missing)}"
        raise UserError(f"{', '.join(missing)} missing", where=HERE, remedy=remedy)
    heads, d_model = known["heads"], known["d_model"]
    if "head_dim" not in known and d_model % heads:
        what = f"d_model={d_model} is not a multiple of heads={heads}"
        raise UserError(what, where=HERE, remedy="add head_dim=...")
    if heads % known.get("kv_heads", heads):
        what = f"kv_heads={known['kv_heads']} does not divide heads={heads}"
        raise UserError(what, where=HERE, remedy="give a divisor of heads")
    sizes = {"kv_heads": heads, "head_dim": d_model // heads, **known}
    if sizes["head_dim"] % 2:
        what = f"head_dim={sizes['head_dim']} is odd"
        raise UserError(what, where=HERE, why="RoPE rotates pairs of channels", remedy="give an even head_dim=...")
    shape = Shape(
        **{key: sizes[key] for key in SHARED if key in sizes}, biases="qkv" if known.get("qkv_bias") else "none"
    )
    return model_plan(shape, seq_len or DEFAULT_SEQ_LEN, Origin(refused=_refusal(sizes)))


def _refusal(sizes: Mapping[str, Any]) -> str:
    """Why a run's configuration cannot have these sizes; empty where it can."""
    try:
        ModelSection.model_validate(sizes)
    except ValidationError as error:
        return describe_problems(error)
    return ""


def _unknown_size(word: str, key: str) -> UserError:
    near = difflib.get_close_matches(key, SHAPE_KEYS, n=1)
    why = f"did you mean {near[0]}?" if near and key not in SHAPE_KEYS else ""
    remedy = f"give some of {', '.join(SHAPE_KEYS)}, as layers=32"
    return UserError(f"{word!r} is not a size of a model", where=HERE, why=why, remedy=remedy)


def _value(key: str, text: str) -> int | bool:
    if key in FLAGS:
        if text in ("true", "false"):
            return text == "true"
        raise UserError(f"{key}={text!r} is not true or false", where=HERE, remedy=f"give {key}=true")
    number = text.replace("_", "")
    if not (number.isascii() and number.isdecimal() and number.strip("0")):
        raise UserError(f"{key}={text!r} is not an integer above 0", where=HERE, remedy="correct it")
    if len(number) > len(str(LARGEST)) or int(number) > LARGEST:
        raise UserError(f"{key}={text!r} is above {LARGEST:,}", where=HERE, remedy="correct it")
    return int(number)


def of_config(path: Path, seq_len: int | None) -> dict[str, Any]:
    """The counts of a Hugging Face config.json, or of the folder that holds one. Raises UserError."""
    file = _config_file(path)
    values = read_json(file, remedy="give a config.json, or the folder of a Hugging Face model")
    settings, left_out = text_settings(values, str(file))
    shape, uncounted = shape_of(settings)
    positions = settings.size("max_position_embeddings")
    try:
        from_config(values, str(file))
        refused = ""
    except UserError as error:
        refused = ": ".join(filter(None, (error.what, error.why)))
    return model_plan(
        shape, seq_len or positions, Origin(positions, settings.assumed, [*left_out, *uncounted], refused)
    )


def _config_file(path: Path) -> Path:
    """Raises UserError for a path that does not exist, and for a folder without a config.json."""
    if path.is_dir():
        if not (path / "config.json").exists():
            remedy = "give the folder of a Hugging Face model, or its config.json"
            raise UserError("this folder has no config.json", where=str(path), remedy=remedy)
        return path / "config.json"
    if path.exists():
        return path
    name = str(path) if HUB_NAME.fullmatch(str(path)) else "NAME"
    remedy = f"download it first (`hf download {name} config.json --local-dir FOLDER`), and give that folder"
    if name == "NAME":
        remedy = f"give a config.json or its folder; if it is a model of the Hugging Face Hub, {remedy}"
    raise UserError(f"{str(path)!r} is not a local folder or file", where="--hf", remedy=remedy)


def of_recipe(name: str, overrides: Sequence[str], seq_len: int | None) -> dict[str, Any]:
    """The counts of a recipe's, a run file's or a run's model, by default at its own sequence length."""
    config = load_run(name, overrides).config
    return model_plan(Shape.of(config.model), seq_len or config.data.seq_len, Origin(config.model.max_positions))


def model_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table for people: what, how many, how it is counted."""
    per_token, symbols = found["training_flops_per_token"], found["symbols"]
    rows = [
        ["parameters", f"{found['parameters']:,}", ""],
        ["  of embedding and head", f"{found['parameters_embedding']:,}", ""],
        ["  without those", f"{found['parameters_non_embedding']:,}", ""],
        ["  that a token passes through", f"{found['parameters_active']:,}", ""],
    ]
    rows += [
        [f"training FLOPs a token, {name}", f"{per_token[name]:.5g}", found["formulas"][name]] for name in FORMULAS
    ]
    rows += [[f"  {letter}", f"{size:,}", SYMBOLS[letter]] for letter, size in symbols.items()]
    rows += [["note", "", found["note"]]] if found["note"] else []
    rows += [["not counted", "", what] for what in found["uncounted"]]
    rows += [["transformers' default", "", f"{key}={_spelled(value)}"] for key, value in found["defaults"].items()]
    rows.append(["can be trained here", "yes" if found["trainable"] else "no", found["not_trainable_because"] or ""])
    return rows


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}"
