"""The shape of any model that Hugging Face's config.json describes, trained here or not, to be counted exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minka.plan.errors import UserError
from minka.plan.flops import Latent, Shape
from minka.plan.hub_family import TRAINED


@dataclass(frozen=True)
class Family:
    """What a family's config.json leaves out: `silent` has transformers' defaults where they differ from Llama's."""

    silent: Mapping[str, Any] = field(default_factory=dict)
    biases: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    whole_qk_norm: bool = False
    mlp_matrices: Literal[2, 3] = 3
    norms: int = 2
    windowed: bool = False  # uses sliding_window without being asked to
    uncounted: tuple[str, ...] = ()  # weights that Shape does not count


QWEN: Mapping[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768}
GEMMA: Mapping[str, Any] = {"head_dim": 256, "tie_word_embeddings": True}
DEEPSEEK: Mapping[str, Any] = {
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}, windowed=True
    ),
    "qwen2": Family(QWEN, biases="qkv"),
    "qwen3": Family({**QWEN, "head_dim": 128}, qk_norm=True),
    "gpt2": Family({"tie_word_embeddings": True}, biases="all", mlp_matrices=2),
    "gpt_neox": Family(biases="all", mlp_matrices=2),
    "olmo2": Family(whole_qk_norm=True),
    "smollm3": Family({"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma": Family(GEMMA),
    "gemma2": Family(
        {**GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2,
         "max_position_embeddings": 8192}, norms=4, windowed=True,
    ),
    "gemma3_text": Family(
        {**GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 6,
         "max_position_embeddings": 131072}, norms=4, qk_norm=True, windowed=True,
    ),
    "phi": Family(biases="all", mlp_matrices=2, norms=1, uncounted=("the bias of the head",)),
    "phi3": Family(windowed=True),
    "mixtral": Family(
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}, windowed=True
    ),
    "qwen3_moe": Family(
        {"num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qk_norm=True,
    ),
    "deepseek_v3": Family(DEEPSEEK),
}  # fmt: skip
SIZES = {  # of Shape and ModelSection, with transformers' names
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab": "vocab_size",
}
ALIASES = {  # other names of the same settings
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "num_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
}
LATENT = {
    "query_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
}


def read_shape(values: Mapping[str, Any], where: str) -> tuple[Shape, list[str]]:
    """Return the shape in a config.json, and by name the settings and weights that the shape does not express.

    Of models that cannot be trained here, too. Raises UserError for an unknown family and for a size that is missing.
    """
    values, others = _text_model(values)
    name = family_in(values, where)
    family, known = FAMILIES[name], with_defaults(name, values)
    if name == "gpt2":
        known.setdefault("intermediate_size", 4 * need_size(known, "hidden_size", where))
    sizes = {ours: need_size(known, theirs, where) for ours, theirs in SIZES.items()}
    window, windowed_layers = _windows(known, window_in(known, values, name), family, sizes["layers"])
    shape = Shape(
        **sizes,
        kv_heads=known.get("num_key_value_heads") or sizes["heads"],
        head_dim=known.get("head_dim") or sizes["d_model"] // sizes["heads"],
        tied=known.get("tie_word_embeddings", False),
        biases=family.biases,
        qk_norm=family.qk_norm,
        whole_qk_norm=family.whole_qk_norm,
        mlp_matrices=family.mlp_matrices,
        learned_positions=need_size(known, "n_positions", where) if name == "gpt2" else 0,
        norms=family.norms,
        **_experts(known, sizes["layers"], where),
        latent=_latent(known, values, where) if name == "deepseek_v3" else None,
        window=window,
        windowed_layers=windowed_layers,
    )
    return shape, [*others, *family.uncounted, *_uncovered(known, name)]


def _text_model(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The settings of the text model of a config that has several, and what is then left out."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        return values, []
    family = text.get("model_type") or f"{values.get('model_type')}_text"
    return {**text, "model_type": family}, [f"all but the text model of this {values.get('model_type')}"]


def _experts(known: Mapping[str, Any], layers: int, where: str) -> dict[str, int]:
    """Shape's fields about experts; none for a dense model."""
    experts = known.get("num_local_experts") or 1
    if experts == 1:
        return {}
    width = known.get("moe_intermediate_size") or 0
    step, without = known.get("decoder_sparse_step") or 1, set(known.get("mlp_only_layers") or [])
    first = known.get("first_k_dense_replace") or 0
    dense = sum(i < first or i in without or (i + 1) % step > 0 for i in range(layers))
    return {
        "experts": experts,
        "active_experts": need_size(known, "num_experts_per_tok", where),
        "expert_ff": width,
        "shared_ff": (known.get("n_shared_experts") or 0) * width,
        "dense_layers": dense,
    }


def _latent(known: Mapping[str, Any], values: Mapping[str, Any], where: str) -> Latent:
    directly = "q_lora_rank" in values and values["q_lora_rank"] is None
    sizes = {ours: need_size(known, theirs, where) for ours, theirs in LATENT.items() if ours != "query_rank"}
    return Latent(query_rank=0 if directly else known["q_lora_rank"], **sizes)


def window_in(known: Mapping[str, Any], values: Mapping[str, Any], family: str) -> int:
    """Tokens that a layer may see at most, where that is fewer than the longest text; else 0."""
    window = values["sliding_window"] if "sliding_window" in values else known.get("sliding_window")
    asked = FAMILIES[family].windowed or known.get("use_sliding_window", False)
    return 0 if not asked or window is None or window >= known.get("max_position_embeddings", 0) else int(window)


def _windows(known: Mapping[str, Any], window: int, family: Family, layers: int) -> tuple[int, int]:
    """The window, and how many layers have it; (0, 0) where all see every token before."""
    if not window:
        return 0, 0
    kinds, pattern = known.get("layer_types"), known.get("sliding_window_pattern") or 0
    if kinds:
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    elif "max_window_layers" in known and not family.windowed:
        windowed = max(0, layers - known["max_window_layers"])
    else:
        windowed = layers - (layers // pattern if pattern else 0)
    return (window, windowed) if windowed else (0, 0)


def family_in(values: Mapping[str, Any], where: str) -> str:
    """The family that a config.json names. Raises UserError for one that cannot be counted."""
    architectures = values.get("architectures") or []
    family = values.get("model_type") or next((f for f, name in TRAINED.items() if name in architectures), None)
    if family not in FAMILIES:
        raise unknown_family(family or architectures, where, "count", FAMILIES)
    return str(family)


def unknown_family(name: object, where: str, done: str, known: Mapping[str, object]) -> UserError:
    what = f"{name!r} is not an architecture that minka can {done}"
    return UserError(what, where=where, remedy=f"known: {', '.join(known)}")


def with_defaults(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not null, by their usual names, over transformers' defaults."""
    known = {**FAMILIES[family].silent, **{key: value for key, value in values.items() if value is not None}}
    return known | {usual: known[alias] for alias, usual in ALIASES.items() if alias in known}


def _uncovered(known: Mapping[str, Any], family: str) -> list[str]:
    """Return the settings that would change what is computed or counted, and that Shape does not express."""
    found = []
    if any(kind not in ("full_attention", "sliding_attention") for kind in known.get("layer_types") or []):
        found.append("layer_types other than full_attention and sliding_attention")
    everywhere = FAMILIES[family].biases == "all"
    biases = ("attention_bias", "mlp_bias")
    return found + [f"{key}={known[key]}".lower() for key in biases if known.get(key, everywhere) != everywhere]


def need_size(values: Mapping[str, Any], key: str, where: str) -> int:
    """An integer above 0. Raises UserError where it is missing or none."""
    size = need(values, key, where)
    if type(size) is not int or size < 1:
        raise UserError(f"{key} is {size!r}, not an integer above 0", where=where, remedy="correct it")
    return size


def need(values: Mapping[str, Any], key: str, where: str) -> Any:
    """A setting. Raises UserError where it is missing."""
    if values.get(key) is None:
        raise UserError(f"{key} is missing", where=where, why="the model's shape follows from it", remedy=f"add {key}")
    return values[key]
