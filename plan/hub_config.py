"""Hugging Face's config.json: as a model to train, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError
from minka.plan.flops import SHARED
from minka.plan.hub_family import TRAINED, family_of, misfit
from minka.plan.hub_settings import text_settings, unknown_family
from minka.plan.hub_shape import SIZES, asked_window, shape_of
from minka.plan.load_config import describe_problems
from minka.plan.read_file import read_json

TRAINED_WITH = {"norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings", "init_std": "initializer_range"}
LLAMA3_ROPE = {ours: ours.replace("_positions", "_position_embeddings") for ours in RopeScaling.model_fields}
ROPE = ("rope_theta", "rope_type", "partial_rotary_factor", *LLAMA3_ROPE.values())
UNTRAINED = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}  # and what minka has


def read_config(folder: Path) -> ModelSection:
    """The model in a Hugging Face folder. Raises UserError for an architecture or setting that minka lacks."""
    path = folder / "config.json"
    return from_config(read_json(path, remedy="give a folder that save_pretrained wrote"), str(path))


def from_config(values: Mapping[str, Any], where: str) -> ModelSection:
    """Return the model that a config.json describes. Raises UserError for what ModelSection cannot represent."""
    settings, uncovered = text_settings(values, where)
    family = settings.family
    if family not in TRAINED:
        raise unknown_family(family, where, "train", TRAINED)
    shape, uncounted = shape_of(settings)
    longest = settings.size("max_position_embeddings")
    uncovered += uncounted
    if window := asked_window(settings):
        uncovered.append(f"sliding_window={window} below max_position_embeddings={longest}")
    if "sliding_attention" in settings.items("layer_types", str):
        uncovered.append("layer_types other than full_attention")
    uncovered += [f"{key}=true" for key in ("attention_bias", "mlp_bias") if settings.asks(key)]
    known = {key: value for key, value in settings.stated.items() if value is not None}
    uncovered += [f"{key}={known[key]!r}" for key, ours in UNTRAINED.items() if known.get(key, ours) != ours]
    if uncovered:
        what = f"this {family} has what minka's models do not have: {'; '.join(uncovered)}"
        raise UserError(what, where=where, remedy="use a model without it")
    fields = {name: getattr(shape, name) for name in SHARED}
    fields |= _rope({"max_position_embeddings": longest, **settings.stated}, where)
    fields |= {ours: known[theirs] for ours, theirs in TRAINED_WITH.items() if theirs in known}
    fields = {"norm_eps": 1e-6, "max_positions": longest, "qkv_bias": shape.biases == "qkv"} | fields
    try:
        return ModelSection.model_validate(fields)
    except ValidationError as error:
        raise UserError(describe_problems(error), where=where, remedy="correct it") from None


def to_config(cfg: ModelSection, family: str, eod_token: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json for transformers 4 and 5, vLLM and llama.cpp's converter, `family` "auto" for the first fit.

    What they read in different places is in all of them. Raises UserError where `family` cannot represent `cfg`.
    """
    if family == "auto":
        family = family_of(cfg)
    if family not in TRAINED:
        raise unknown_family(family, "family", "write", TRAINED)
    if why := misfit(cfg, family):
        raise UserError(why, where="family", remedy=f'set family="auto", which is {family_of(cfg)} here')
    return {
        **{theirs: getattr(cfg, ours) for ours, theirs in (SIZES | TRAINED_WITH).items()},
        **_rope_of(cfg),
        **_of_family(family, cfg.layers),
        "architectures": [TRAINED[family]],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": eod_token,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "model_type": family,
        "num_key_value_heads": cfg.kv_heads,
        "pad_token_id": None,
        "tie_word_embeddings": cfg.tied,
        "torch_dtype": dtype,  # before transformers 4.56
        # Without it transformers 4.57 takes every local tokenizer of more than 100,000 entries for a broken Mistral's,
        # and 5 those of our Mistrals: both then recommend an option that changes the tokens (issue 42591 there).
        "transformers_version": "5.0.0",
        "use_cache": True,
    }


def _rope_of(cfg: ModelSection) -> dict[str, Any]:
    """Return RoPE's settings as transformers 5 reads them (rope_parameters), and as 4 does, at the top level."""
    scaling: dict[str, Any] = {theirs: getattr(cfg.rope_scaling, ours, None) for ours, theirs in LLAMA3_ROPE.items()}
    if cfg.rope_scaling is None:
        return {
            "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": cfg.rope_theta,
        }
    scaling |= {"rope_type": "llama3"}
    return {
        # llama.cpp's converter looks for it here alone, and assumes 8192.
        "original_max_position_embeddings": cfg.rope_scaling.original_max_positions,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
        "rope_scaling": scaling,
        "rope_theta": cfg.rope_theta,
    }


def _of_family(family: str, layers: int) -> dict[str, Any]:
    """Return the settings that one family has: no window, and biases where `family` always has them."""
    if family == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        return {"sliding_window": None}
    whole = {"layer_types": ["full_attention"] * layers, "max_window_layers": layers}
    biases = {"attention_bias": False} if family == "qwen3" else {}
    return {"sliding_window": None, "use_sliding_window": False, **whole, **biases}


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return base and scaling from rope_parameters (transformers 5), or rope_theta and rope_scaling (4), or all.

    Raises UserError where they contradict each other: readers then differ in which they take.
    """
    places: dict[str, dict[str, Any]] = {"config.json": {key: values.get(key) for key in ROPE if key != "rope_type"}}
    for place in ("rope_scaling", "rope_parameters"):
        table = values.get(place)
        if place in values and (table is not None or place == "rope_scaling"):  # null: that it is not scaled
            places |= _rope_table(table or {}, place, where)
    rope: dict[str, Any] = {
        "rope_theta": 10_000.0,
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": values.get("max_position_embeddings"),
    }
    for key in ROPE:
        stated = {place: table[key] for place, table in places.items() if table.get(key) is not None}
        rope[key] = next(iter(stated.values()), rope.get(key))
        if any(value != rope[key] for value in stated.values()):
            what = f"{key} is " + " and ".join(f"{value!r} in {place}" for place, value in stated.items())
            why = "transformers 4 and 5 would load different models"
            raise UserError(what, where=where, why=why, remedy="find out which one is right, and correct the other")
    kind, part = rope["rope_type"], rope["partial_rotary_factor"]
    if kind not in ("default", "llama3") or part != 1.0:
        what = f"rope_type={kind!r} with partial_rotary_factor={part} cannot be represented"
        why = "minka rotates every channel of a head, by plain or Llama-3 scaled frequencies"
        raise UserError(what, where=where, why=why, remedy="use a model with rope_type default or llama3")
    found = {"rope_theta": rope["rope_theta"]}
    if kind == "default":
        return found
    return found | {"rope_scaling": {ours: _need(rope, theirs, where) for ours, theirs in LLAMA3_ROPE.items()}}


def _need(rope: Mapping[str, Any], key: str, where: str) -> Any:
    if rope.get(key) is None:
        raise UserError(f"{key} is missing", where=where, why="llama3's frequencies need it", remedy=f"add {key}")
    return rope[key]


def _rope_table(table: Any, place: str, where: str) -> dict[str, dict[str, Any]]:
    """Return the settings by place; `type` is the older name of rope_type, and counts as a place of its own."""
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        what = f"{place} is not one table of numbers"
        raise UserError(what, where=where, why="minka's layers all rotate alike", remedy="use a model whose layers do")
    kind = table.get("rope_type") or table.get("type") or "default"
    return {place: {**table, "rope_type": kind}, f"{place}.type": {"rope_type": table.get("type")}}
