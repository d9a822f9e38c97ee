"""Hugging Face's config.json: as a model to train, as the shape of one that can only be counted, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError
from minka.plan.flops import SHARED, Shape
from minka.plan.load_config import describe_problems
from minka.plan.read_file import read_json

TRAINED = {family.lower(): f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@dataclass(frozen=True)
class Family:
    """What a family's config.json leaves out: `silent` has transformers' defaults where they differ from Llama's."""

    silent: Mapping[str, Any] = field(default_factory=dict)
    biases: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    mlp_matrices: Literal[2, 3] = 3
    norms: int = 2
    uncounted: tuple[str, ...] = ()  # weights that Shape does not count


QWEN: Mapping[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
    "qwen2": Family(QWEN, biases="qkv"),
    "qwen3": Family({**QWEN, "head_dim": 128}, qk_norm=True),
    "gpt2": Family({"tie_word_embeddings": True}, biases="all", mlp_matrices=2),
    "gpt_neox": Family(biases="all", mlp_matrices=2),
    "gemma": Family({"head_dim": 256, "tie_word_embeddings": True}),
    "gemma2": Family({"head_dim": 256, "tie_word_embeddings": True}, norms=4),
    "phi": Family(biases="all", mlp_matrices=2, norms=1, uncounted=("the bias of the head",)),
    "phi3": Family(),
    "mixtral": Family({"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": Family({"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}, qk_norm=True),
}
SIZES = {  # of Shape and ModelSection, with transformers' names
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab": "vocab_size",
}
TRAINED_WITH = {"norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings", "init_std": "initializer_range"}
LLAMA3_ROPE = {ours: ours.replace("_positions", "_position_embeddings") for ours in RopeScaling.model_fields}
ALIASES = {  # other names of the same settings
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "num_experts": "num_local_experts",
    "moe_intermediate_size": "intermediate_size",
}
WINDOWED = ("mistral", "mixtral", "gemma2", "phi3")  # use sliding_window without being asked to
UNTRAINED = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}  # and what minka has


def read_shape(values: Mapping[str, Any], where: str) -> tuple[Shape, list[str]]:
    """Return the shape in a config.json, and by name the settings and weights that the shape does not express.

    Of models that cannot be trained here, too. Raises UserError for an unknown family and for a size that is missing.
    """
    name = _family(values, where)
    family, known = FAMILIES[name], _with_defaults(name, values)
    if name == "gpt2":
        known.setdefault("intermediate_size", 4 * _size(known, "hidden_size", where))
    sizes = {ours: _size(known, theirs, where) for ours, theirs in SIZES.items()}
    experts = known.get("num_local_experts") or 1
    shape = Shape(
        **sizes,
        kv_heads=known.get("num_key_value_heads") or sizes["heads"],
        head_dim=known.get("head_dim") or sizes["d_model"] // sizes["heads"],
        tied=known.get("tie_word_embeddings", False),
        biases=family.biases,
        qk_norm=family.qk_norm,
        mlp_matrices=family.mlp_matrices,
        learned_positions=_size(known, "n_positions", where) if name == "gpt2" else 0,
        norms=family.norms,
        experts=experts,
        active_experts=_size(known, "num_experts_per_tok", where) if experts > 1 else 1,
    )
    return shape, [*family.uncounted, *_uncovered(known, values, name)]


def read_config(folder: Path) -> ModelSection:
    """The model in a Hugging Face folder. Raises UserError for an architecture or setting that minka lacks."""
    path = folder / "config.json"
    return from_config(read_json(path, remedy="give a folder that save_pretrained wrote"), str(path))


def from_config(values: Mapping[str, Any], where: str) -> ModelSection:
    """Return the model that a config.json describes. Raises UserError for what ModelSection cannot represent."""
    family = _family(values, where)
    if family not in TRAINED:
        raise _unknown(family, where, "train", TRAINED)
    shape, uncovered = read_shape(values, where)
    known = _with_defaults(family, values)
    uncovered += [f"{key}={known[key]!r}" for key, ours in UNTRAINED.items() if known.get(key, ours) != ours]
    if uncovered:
        what = f"this {family} has what minka's models do not have: {'; '.join(uncovered)}"
        raise UserError(what, where=where, remedy="use a model without it")
    fields = {name: getattr(shape, name) for name in SHARED} | _rope(known, where)
    fields |= {ours: known[theirs] for ours, theirs in TRAINED_WITH.items() if theirs in known}
    fields = {"norm_eps": 1e-6, "max_positions": 2048, "qkv_bias": shape.biases == "qkv"} | fields
    try:
        return ModelSection.model_validate(fields)
    except ValidationError as error:
        raise UserError(describe_problems(error), where=where, remedy="correct it") from None


def to_config(cfg: ModelSection, family: str, eod_token: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json in the form of transformers 5. Raises UserError where `family` cannot represent `cfg`."""
    if family == "auto":
        family = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    if family not in TRAINED:
        raise _unknown(family, "family", "write", TRAINED)
    if (cfg.qkv_bias, cfg.qk_norm) != (family == "qwen2", family == "qwen3"):
        what = f"{family} cannot represent qkv_bias={cfg.qkv_bias} with qk_norm={cfg.qk_norm}"
        why = "only qwen2 has biases on q, k and v, and only qwen3 has norms on q and k"
        raise UserError(what, where="family", why=why, remedy='set family="auto" for the one that fits, if any does')
    if family == "llama" and cfg.d_model % cfg.heads:
        what = f"transformers refuses a Llama whose d_model={cfg.d_model} is not a multiple of heads={cfg.heads}"
        raise UserError(what, where="family", remedy='set family="mistral", which is the same model')
    rope = {"rope_theta": cfg.rope_theta, "rope_type": "llama3" if cfg.rope_scaling else "default"}
    rope |= {theirs: getattr(cfg.rope_scaling, ours) for ours, theirs in LLAMA3_ROPE.items() if cfg.rope_scaling}
    config: dict[str, Any] = {
        **{theirs: getattr(cfg, ours) for ours, theirs in (SIZES | TRAINED_WITH).items()},
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
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
    }
    config |= {"attention_bias": False, "mlp_bias": False} if family == "llama" else {"sliding_window": None}
    if family.startswith("qwen"):
        config |= {"use_sliding_window": False}
    return config


def _family(values: Mapping[str, Any], where: str) -> str:
    architectures = values.get("architectures") or []
    family = values.get("model_type") or next((f for f, name in TRAINED.items() if name in architectures), None)
    if family not in FAMILIES:
        raise _unknown(family or architectures, where, "count", FAMILIES)
    return str(family)


def _unknown(name: object, where: str, done: str, known: Mapping[str, object]) -> UserError:
    what = f"{name!r} is not an architecture that minka can {done}"
    return UserError(what, where=where, remedy=f"known: {', '.join(known)}")


def _with_defaults(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not null, by their usual names, over transformers' defaults."""
    known = {**FAMILIES[family].silent, **{key: value for key, value in values.items() if value is not None}}
    return known | {usual: known[alias] for alias, usual in ALIASES.items() if alias in known}


def _uncovered(known: Mapping[str, Any], values: Mapping[str, Any], family: str) -> list[str]:
    """Return the settings that would change what is computed or counted, and that Shape does not express."""
    found = []
    windowed = family in WINDOWED or known.get("use_sliding_window", False)
    window = values["sliding_window"] if "sliding_window" in values else known.get("sliding_window")
    if windowed and window is not None and window < known.get("max_position_embeddings", 0):
        found.append(f"sliding_window={window} below max_position_embeddings={known['max_position_embeddings']}")
    if any(kind != "full_attention" for kind in known.get("layer_types") or []):
        found.append("layer_types other than full_attention")
    everywhere = FAMILIES[family].biases == "all"
    biases = ("attention_bias", "mlp_bias")
    found += [f"{key}={known[key]}".lower() for key in biases if known.get(key, everywhere) != everywhere]
    without_experts = ("mlp_only_layers", "decoder_sparse_step")  # some layers
    found += [f"{key}={known[key]}" for key in without_experts if known.get(key) not in (None, [], 1)]
    return found


def _rope(known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = known.get("rope_scaling") or known.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    part = rope.get("partial_rotary_factor") or known.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "llama3") or part != 1.0:
        what = f"rope_type={kind!r} with partial_rotary_factor={part} cannot be represented"
        why = "minka rotates every channel of a head, by plain or Llama-3 scaled frequencies"
        raise UserError(what, where=where, why=why, remedy="use a model with rope_type default or llama3")
    found = {"rope_theta": float(rope.get("rope_theta") or known.get("rope_theta") or 10_000.0)}
    if kind == "default":
        return found
    length = known.get("original_max_position_embeddings") or known.get("max_position_embeddings")
    rope = {"original_max_position_embeddings": length, **rope}
    return found | {"rope_scaling": {ours: _need(rope, theirs, where) for ours, theirs in LLAMA3_ROPE.items()}}


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    size = _need(values, key, where)
    if type(size) is not int or size < 1:
        raise UserError(f"{key} is {size!r}, not an integer above 0", where=where, remedy="correct it")
    return size


def _need(values: Mapping[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{key} is missing", where=where, why="the model's shape follows from it", remedy=f"add {key}")
    return values[key]
