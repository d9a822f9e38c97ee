"""Hugging Face's config.json to ModelSection and back, for the families that ModelSection can represent."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers 5 assumes where a config.json is silent, and which would be wrong to leave out.
SILENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
}


def from_config(values: Mapping[str, Any], where: str) -> ModelSection:
    """The model that a config.json describes. Raises UserError for what ModelSection cannot represent."""
    family = _family(values, where)
    known = SILENT[family] | {key: value for key, value in values.items() if value is not None}
    _refuse(known, values, family, where)
    heads, width = _need(known, "num_attention_heads", where), _need(known, "hidden_size", where)
    theta, scaling = _rope(known, where)
    try:
        return ModelSection(
            layers=_need(known, "num_hidden_layers", where),
            d_model=width,
            heads=heads,
            kv_heads=known.get("num_key_value_heads", heads),
            head_dim=known.get("head_dim") or width // heads,
            d_ff=_need(known, "intermediate_size", where),
            vocab=_need(known, "vocab_size", where),
            tied=known.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=known.get("rms_norm_eps", 1e-6),
            max_positions=known.get("max_position_embeddings", 2048),
            init_std=known.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{field} = {first['input']!r}: {first['msg']}", where=where, remedy="mend config.json"
        ) from None


def to_config(cfg: ModelSection, family: str, eod_token: int | None, dtype: str) -> dict[str, Any]:
    """config.json in the form of transformers 5. Raises UserError where `family` cannot represent `cfg`."""
    family = family_of(cfg) if family == "auto" else family
    if family not in ARCHITECTURES:
        raise _unknown(family, "family")
    if (cfg.qkv_bias, cfg.qk_norm) != (family == "qwen2", family == "qwen3"):
        raise UserError(
            f"{family} cannot represent qkv_bias={cfg.qkv_bias} with qk_norm={cfg.qk_norm}",
            where="family",
            why="only qwen2 has biases on q, k and v, always, and only qwen3 has norms on q and k, always",
            remedy='family="auto" finds the one that fits, if there is one',
        )
    if family == "llama" and cfg.d_model % cfg.heads:
        raise UserError(
            f"d_model={cfg.d_model} is no multiple of heads={cfg.heads}",
            where="family",
            why="transformers refuses such a Llama, even with head_dim given",
            remedy='use family="mistral", which is the same model',
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": eod_token,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_positions,
        "model_type": family,
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.layers,
        "num_key_value_heads": cfg.kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": cfg.norm_eps,
        "rope_parameters": _rope_parameters(cfg),
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        "vocab_size": cfg.vocab,
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"sliding_window": None}
    if family.startswith("qwen"):
        config |= {"use_sliding_window": False}
    return config


def family_of(cfg: ModelSection) -> str:
    """The family whose layout `cfg` has; to_config refuses where none has it."""
    return "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"


def _family(values: Mapping[str, Any], where: str) -> str:
    architectures = values.get("architectures") or []
    family = values.get("model_type") or next((f for f, name in ARCHITECTURES.items() if name in architectures), None)
    if family not in ARCHITECTURES:
        raise _unknown(family or architectures, where)
    return str(family)


def _unknown(name: object, where: str) -> UserError:
    return UserError(
        f"{name!r} is no architecture that minka knows",
        where=where,
        why="a model is read and written only where every number it computes can be the same",
        remedy=f"known: {', '.join(ARCHITECTURES)}",
    )


def _refuse(known: Mapping[str, Any], values: Mapping[str, Any], family: str, where: str) -> None:
    """Raise UserError for settings that would silently compute something else here."""
    windowed = family == "mistral" or known.get("use_sliding_window", False)
    window = values["sliding_window"] if "sliding_window" in values else SILENT[family].get("sliding_window")
    unlike = []
    if windowed and window is not None and window < known.get("max_position_embeddings", 0):
        unlike.append(f"sliding_window={window} below max_position_embeddings={known['max_position_embeddings']}")
    if any(kind != "full_attention" for kind in known.get("layer_types") or []):
        unlike.append("layer_types other than full_attention")
    for key in ("attention_bias", "mlp_bias"):
        if known.get(key):
            unlike.append(f"{key}=true (biases beyond those on q, k and v)")
    if known.get("hidden_act", "silu") != "silu":
        unlike.append(f"hidden_act={known['hidden_act']!r}")
    if known.get("attention_dropout"):
        unlike.append(f"attention_dropout={known['attention_dropout']}")
    if known.get("quantization_config"):
        unlike.append("quantization_config")
    if unlike:
        raise UserError(
            f"this {family} cannot be represented: {'; '.join(unlike)}",
            where=where,
            why="minka's model attends to the whole document and has no such part",
            remedy="use a model without it",
        )


def _rope(known: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the `rope_theta` and `rope_scaling` before it."""
    rope = dict(known.get("rope_scaling") or known.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or known.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise _unlike_rope(f"rope_type={kind!r}", where)
    if (rope.get("partial_rotary_factor") or known.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _unlike_rope("partial_rotary_factor below 1", where)
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings") or known.get("original_max_position_embeddings")
    return theta, RopeScaling(
        factor=_need(rope, "factor", where),
        low_freq_factor=_need(rope, "low_freq_factor", where),
        high_freq_factor=_need(rope, "high_freq_factor", where),
        original_max_positions=original or _need(known, "max_position_embeddings", where),
    )


def _unlike_rope(what: str, where: str) -> UserError:
    return UserError(
        f"{what} cannot be represented",
        where=where,
        why="minka turns every channel of a head by plain or Llama-3 scaled frequencies",
        remedy="use a model with rope_type default or llama3",
    )


def _rope_parameters(cfg: ModelSection) -> dict[str, Any]:
    if cfg.rope_scaling is None:
        return {"rope_theta": cfg.rope_theta, "rope_type": "default"}
    return {
        "factor": cfg.rope_scaling.factor,
        "high_freq_factor": cfg.rope_scaling.high_freq_factor,
        "low_freq_factor": cfg.rope_scaling.low_freq_factor,
        "original_max_position_embeddings": cfg.rope_scaling.original_max_positions,
        "rope_theta": cfg.rope_theta,
        "rope_type": "llama3",
    }


def _need(values: Mapping[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{key} is missing", where=where, why="the model's shape follows from it", remedy=f"add {key}")
    return values[key]
