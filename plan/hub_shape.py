"""The shape of any model that Hugging Face's config.json describes, trained here or not, to be counted exactly."""

from collections.abc import Mapping
from typing import Any

from minka.plan.flops import Latent, Shape
from minka.plan.hub_defaults import DEFAULTS, FAMILIES, Family
from minka.plan.hub_settings import HubSettings, text_settings

SIZES = {  # of Shape and ModelSection, with transformers' names
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab": "vocab_size",
}
LATENT = {
    "kv_rank": "kv_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
}
ATTENTION_KINDS = ("full_attention", "sliding_attention")
PAIRS = "RoPE rotates pairs of channels"


def read_shape(values: Mapping[str, Any], where: str) -> tuple[Shape, list[str]]:
    """Return the shape in a config.json, and by name the settings and weights that the shape does not express.

    Of models that cannot be trained here, too. Raises UserError for an unknown family and for a setting that is wrong.
    """
    settings, left_out = text_settings(values, where)
    shape, uncounted = shape_of(settings)
    return shape, [*left_out, *uncounted]


def shape_of(settings: HubSettings) -> tuple[Shape, list[str]]:
    """The same, of settings. Raises UserError for one that is wrong."""
    family = FAMILIES[settings.family]
    sizes: dict[str, Any] = {ours: settings.size(theirs) for ours, theirs in SIZES.items() if ours != "d_ff"}
    d_ff = settings.optional_size("intermediate_size") if settings.family == "gpt2" else settings.size(SIZES["d_ff"])
    sizes["d_ff"] = d_ff = d_ff or 4 * sizes["d_model"]
    latent = _latent(settings) if settings.has("kv_lora_rank") else None
    kv_heads, head_dim = _heads(settings, family, sizes["d_model"], sizes["heads"])
    window, windowed_layers = _windows(settings, sizes["layers"])
    shape = Shape(
        **sizes,
        kv_heads=kv_heads,
        head_dim=0 if latent else head_dim,
        tied=settings.flag("tie_word_embeddings"),
        **_biases(settings, family),
        qk_norm=family.qk_norm or settings.asks("qk_layernorm"),
        whole_qk_norm=family.whole_qk_norm,
        mlp_matrices=family.mlp_matrices,
        learned_positions=settings.size("max_position_embeddings") if family.rotates == "none" else 0,
        norms=family.norms,
        **_experts(settings, sizes["layers"], d_ff),
        latent=latent,
        window=window,
        windowed_layers=windowed_layers,
    )
    return shape, [*family.uncounted, *_uncounted(settings, family)]


def _heads(settings: HubSettings, family: Family, d_model: int, heads: int) -> tuple[int, int]:
    """Key/value heads, and the width of a head."""
    ignored = family.rotates == "none" or settings.family == "gpt_neox"  # both are then no settings of the model
    kv_heads = settings.optional_size("num_key_value_heads")
    follows = DEFAULTS[settings.family]["head_dim"] is None  # from hidden_size where it is null
    head_dim = settings.optional_size("head_dim") if follows else settings.size("head_dim")
    if settings.has("kv_lora_rank"):
        if "num_key_value_heads" in settings.stated and kv_heads not in (None, heads):
            why = f"latent attention has a key and a value for each of its {heads} heads"
            raise settings.wrong("num_key_value_heads", f"not {heads}", why)
        settings.assumed.pop("num_key_value_heads", None)
        return heads, 0
    if kv_heads and (heads % kv_heads or (ignored and kv_heads != heads)):
        reason = f"not {heads}" if ignored else f"not a divisor of num_attention_heads={heads}"
        raise settings.wrong("num_key_value_heads", reason, "each must serve the same number of query heads")
    if (head_dim is None or ignored) and d_model % heads:
        reason = f"not a divisor of hidden_size={d_model:,}"
        why = "the width of a head is hidden_size / num_attention_heads" + ("" if ignored else " without head_dim")
        raise settings.wrong("num_attention_heads", reason, why)
    if ignored and head_dim not in (None, d_model // heads):
        why = f"the width of a head is hidden_size / num_attention_heads in every {settings.family}"
        raise settings.wrong("head_dim", f"not {d_model // heads}", why)
    width = head_dim or d_model // heads
    if width % 2 and family.rotates == "whole":
        if head_dim:
            raise settings.wrong("head_dim", "not even", PAIRS)
        raise settings.wrong("num_attention_heads", f"which makes heads {width} wide, an odd number", PAIRS)
    return kv_heads or heads, width


def _biases(settings: HubSettings, family: Family) -> dict[str, Any]:
    """Shape's fields about biases."""
    attention, mlp = settings.asks("attention_bias"), settings.asks("mlp_bias")
    if family.biases == "all" and settings.has("attention_bias") and not attention:
        return {"biases": "none", "mlp_biases": True, "norm_biases": True}
    return {"biases": "qkvo" if attention and family.biases == "none" else family.biases, "mlp_biases": mlp}


def _experts(settings: HubSettings, layers: int, d_ff: int) -> dict[str, Any]:
    """Shape's fields about experts; none for a dense model."""
    if not settings.has("num_local_experts"):
        return {}
    experts = settings.size("num_local_experts")
    active = settings.size("num_experts_per_tok", most=experts, why=f"num_local_experts is {experts:,}")
    width = settings.size("moe_intermediate_size") if settings.has("moe_intermediate_size") else d_ff
    first = shared = 0
    if settings.has("first_k_dense_replace"):
        first = settings.size("first_k_dense_replace", 0, layers, f"the model has {layers} layers")
        shared = settings.optional_size("n_shared_experts", 0) or 0
    step, without = 1, []
    if settings.has("decoder_sparse_step"):
        step, without = settings.size("decoder_sparse_step"), settings.items("mlp_only_layers", int)
        if any(not 0 <= layer < layers for layer in without):
            raise settings.wrong("mlp_only_layers", f"not all of them layers from 0 to {layers - 1}")
    return {
        "experts": experts,
        "active_experts": active,
        "expert_ff": width,
        "shared_ff": shared * width,
        "dense_layers": sum(i < first or i in without or (i + 1) % step > 0 for i in range(layers)),
    }


def _latent(settings: HubSettings) -> Latent:
    """Null for q_lora_rank: queries are projected directly."""
    latent = Latent(
        query_rank=settings.optional_size("q_lora_rank") or 0,
        **{ours: settings.size(theirs) for ours, theirs in LATENT.items()},
    )
    if latent.rope_dim % 2:
        raise settings.wrong("qk_rope_head_dim", "not even", PAIRS)
    return latent


def asked_window(settings: HubSettings) -> int:
    """Tokens that a layer may see at most, where that is fewer than the longest text; else 0."""
    if not settings.has("sliding_window"):
        return 0
    if settings.has("use_sliding_window") and not settings.flag("use_sliding_window"):
        return 0
    window = settings.optional_size("sliding_window")
    return 0 if window is None or window >= settings.size("max_position_embeddings") else window


def _windows(settings: HubSettings, layers: int) -> tuple[int, int]:
    """The window, and how many layers have it; (0, 0) where all see every token before."""
    kinds = settings.items("layer_types", str, layers) if settings.has("layer_types") else []
    window = asked_window(settings)
    if "sliding_attention" in kinds and settings.has("use_sliding_window") and not settings.flag("use_sliding_window"):
        raise settings.wrong("layer_types", "with sliding_attention", "use_sliding_window is false")
    if "sliding_attention" in kinds and settings.get("sliding_window") is None:
        raise settings.wrong("layer_types", "with sliding_attention", "sliding_window is null")
    if not window:
        return 0, 0
    if kinds:
        windowed = kinds.count("sliding_attention")
    elif settings.has("max_window_layers"):
        windowed = max(0, layers - settings.size("max_window_layers", 0))
    elif settings.has("no_rope_layers"):
        windowed = _unrotated(settings, layers)
    elif settings.has("sliding_window_pattern"):
        windowed = layers - layers // settings.size("sliding_window_pattern")
    else:
        windowed = layers
    return (window, windowed) if windowed else (0, 0)


def _unrotated(settings: HubSettings, layers: int) -> int:
    """SmolLM3's layers without RoPE, which are those that have its window."""
    rotated = settings.items("no_rope_layers", int, layers)  # 1 where it is
    return rotated.count(0) if rotated else layers // settings.size("no_rope_layer_interval")


def _uncounted(settings: HubSettings, family: Family) -> list[str]:
    """Return the settings that would change what is computed or counted, and that Shape does not express."""
    found = []
    if settings.has("layer_types") and set(settings.items("layer_types", str)) - {*ATTENTION_KINDS}:
        found.append("layer_types other than full_attention and sliding_attention")
    everywhere = family.biases == "all"
    for key in ("attention_bias", "mlp_bias"):
        if key in settings.stated and not settings.has(key) and settings.flag(key) != everywhere:
            found.append(f"{key}={settings.flag(key)}".lower())
    found += ["add_cross_attention=true"] if settings.asks("add_cross_attention") else []
    both_ways = "use_bidirectional_attention"  # may be null
    if settings.has(both_ways) and settings.get(both_ways) is not None and settings.flag(both_ways):
        found.append(f"{both_ways}=true")
    predicted = settings.optional_size("num_nextn_predict_layers", 0) if settings.has("kv_lora_rank") else None
    if predicted:
        found.append(f"the multi-token prediction module (num_nextn_predict_layers={predicted})")
    step = settings.optional_size("moe_layer_freq") if settings.has("kv_lora_rank") else None
    return [*found, f"moe_layer_freq={step}"] if step and step > 1 else found
