"""The families of Hugging Face models that are counted, and what transformers takes for a setting that is missing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What a family's config.json does not say."""

    architecture: str  # transformers' class
    biases: Literal["none", "qkv", "all"] = "none"  # without being asked to
    qk_norm: bool = False
    whole_qk_norm: bool = False
    mlp_matrices: Literal[2, 3] = 3
    norms: int = 2
    rotates: Literal["none", "part", "whole"] = "whole"  # of each head, by RoPE
    uncounted: tuple[str, ...] = ()  # weights that Shape does not count


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biases="qkv"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gpt2": Family("GPT2LMHeadModel", biases="all", mlp_matrices=2, rotates="none"),
    "gpt_neox": Family("GPTNeoXForCausalLM", biases="all", mlp_matrices=2, rotates="part"),
    "olmo2": Family("Olmo2ForCausalLM", whole_qk_norm=True),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", norms=4),
    "gemma3_text": Family("Gemma3ForCausalLM", norms=4, qk_norm=True),
    "phi": Family(
        "PhiForCausalLM", biases="all", mlp_matrices=2, norms=1, rotates="part", uncounted=("the bias of the head",)
    ),
    "phi3": Family("Phi3ForCausalLM", rotates="part"),
    "mixtral": Family("MixtralForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True),
    "deepseek_v3": Family("DeepseekV3ForCausalLM"),
}
COLUMNS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",  # None: one for each head
    "head_dim",  # None: hidden_size / num_attention_heads
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
SIZES_BY_FAMILY: Mapping[str, tuple[int | None, ...]] = {
    "llama":       (32, 4096,  32,  None, None, 11008,  32000,   2048),
    "mistral":     (32, 4096,  32,  8,    None, 14336,  32000, 131072),
    "qwen2":       (32, 4096,  32,  32,   None, 22016, 151936,  32768),
    "qwen3":       (32, 4096,  32,  32,   128,  22016, 151936,  32768),
    "gpt2":        (12, 768,   12,  None, None, None,   50257,   1024),
    "gpt_neox":    (44, 6144,  64,  None, None, 24576,  50432,   2048),
    "olmo2":       (32, 4096,  32,  None, None, 11008,  50304,   2048),
    "smollm3":     (36, 2048,  16,  4,    None, 11008, 128256,  32768),
    "gemma":       (28, 3072,  16,  16,   256,  24576, 256000,   8192),
    "gemma2":      (26, 2304,  8,   4,    256,  9216,  256000,   8192),
    "gemma3_text": (26, 2304,  8,   4,    256,  9216,  262208, 131072),
    "phi":         (24, 2048,  32,  None, None, 8192,   51200,   2048),
    "phi3":        (32, 3072,  32,  None, None, 8192,   32064,   4096),
    "mixtral":     (32, 4096,  32,  8,    None, 14336,  32000, 131072),
    "qwen3_moe":   (24, 2048,  32,  4,    None, 6144,  151936,  32768),
    "deepseek_v3": (61, 7168,  128, 128,  None, 18432, 129280,   4096),
}  # fmt: skip
QWEN: Mapping[str, Any] = {"use_sliding_window": False, "sliding_window": 4096}
QWEN_DENSE: Mapping[str, Any] = {**QWEN, "max_window_layers": 28, "layer_types": None}
SMOLLM3: Mapping[str, Any] = {
    "mlp_bias": False, "use_sliding_window": False, "sliding_window": None, "layer_types": None,
    "no_rope_layers": None, "no_rope_layer_interval": 4,
}  # fmt: skip
DEEPSEEK: Mapping[str, Any] = {
    "num_local_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
QWEN3_MOE: Mapping[str, Any] = {
    **QWEN, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}  # fmt: skip
ALTERNATING: Mapping[str, Any] = {"tie_word_embeddings": True, "sliding_window": 4096, "layer_types": None}
REST_BY_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 4096},
    "qwen2": QWEN_DENSE,
    "qwen3": {**QWEN_DENSE, "attention_bias": False},
    "gpt2": {"tie_word_embeddings": True, "add_cross_attention": False},
    "gpt_neox": {"attention_bias": True},
    "olmo2": {"attention_bias": False},
    "smollm3": {**SMOLLM3, "attention_bias": False, "tie_word_embeddings": True},
    "gemma": {"attention_bias": False, "tie_word_embeddings": True, "use_bidirectional_attention": None},
    "gemma2": {
        **ALTERNATING, "attention_bias": False, "sliding_window_pattern": 2, "use_bidirectional_attention": None,
    },
    "gemma3_text": {
        **ALTERNATING, "attention_bias": False, "sliding_window_pattern": 6, "use_bidirectional_attention": False,
    },
    "phi": {"qk_layernorm": False},
    "phi3": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**QWEN3_MOE, "attention_bias": False},
    "deepseek_v3": {**DEEPSEEK, "attention_bias": False},
}  # fmt: skip
# By family and usual name, all settings that a family reads; transformers ignores any other.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    family: {
        **dict(zip(COLUMNS, SIZES_BY_FAMILY[family], strict=True)),
        "tie_word_embeddings": False,
        **REST_BY_FAMILY[family],
    }
    for family in FAMILIES
}
# Other names of the same settings; attribute_map in transformers' classes.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "deepseek_v3": {"n_routed_experts": "num_local_experts", "num_mtp_layers": "num_nextn_predict_layers"},
}
