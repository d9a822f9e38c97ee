"""A config.json is a model to train, the shape of one to count, or refused by the name of what is in the way."""

import re
from typing import Any

import pytest

from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError
from minka.plan.flops import Shape, parameters, training_flops_per_token
from minka.plan.hub_config import from_config, to_config
from minka.plan.hub_shape import read_shape

# Llama 3.1 8B's published config.json: rope_theta and rope_scaling at the top level, no head_dim.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def config(family: str, **extra: Any) -> dict[str, Any]:
    """A small model of a trained family, as transformers 5 writes it."""
    small = ModelSection(layers=2, d_model=48, heads=6, kv_heads=2, head_dim=8, d_ff=80, vocab=300)
    small = small.model_copy(update={"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(family, {}))
    return to_config(small, family, 0, "float32") | extra


def usual(family: str, layers: int, d: int, heads: int, kv_heads: int, d_ff: int, vocab: int, **extra: Any) -> Any:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": d_ff,
        "vocab_size": vocab,
        **extra,
    }


GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
MIXTRAL = usual("mixtral", 32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2)
QWEN3_MOE = usual("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128)
PUBLISHED = {  # config.json and the published number of parameters
    "Llama-3.1-8B": (LLAMA, 8_030_261_248),
    "gpt2": (GPT2, 124_439_808),
    "pythia-160m": (usual("gpt_neox", 12, 768, 12, 12, 3072, 50304), 162_322_944),
    "gemma-2b": (usual("gemma", 18, 2048, 8, 1, 16384, 256000, head_dim=256), 2_506_172_416),
    "gemma-2-2b": (usual("gemma2", 26, 2304, 8, 4, 9216, 256000, head_dim=256), 2_614_341_888),
    "Phi-3-mini": (usual("phi3", 32, 3072, 32, 32, 8192, 32064), 3_821_079_552),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30_532_122_624),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_read_and_counted_exactly(model: str) -> None:
    values, count = PUBLISHED[model]
    shape, uncovered = read_shape(values, "config.json")
    assert parameters(shape) == count
    assert uncovered == []


def test_a_weight_that_is_not_counted_is_named() -> None:
    """phi-2 has 2,779,683,840 parameters, of which 51,200 are the bias of its head."""
    shape, uncovered = read_shape(usual("phi", 32, 2560, 32, 32, 10240, 51200), "config.json")
    assert parameters(shape) == 2_779_683_840 - 51_200
    assert uncovered == ["the bias of the head"]


def test_experts_that_a_token_does_not_pass_through_cost_it_nothing() -> None:
    sparse, _ = read_shape(MIXTRAL, "config.json")
    dense, _ = read_shape(MIXTRAL | {"model_type": "mistral", "sliding_window": None}, "config.json")
    router, expert = 4096 * 8, 3 * 4096 * 14336
    more = training_flops_per_token(sparse, 4096) - training_flops_per_token(dense, 4096)
    assert more == 6 * 32 * (router + expert)


def test_settings_that_a_shape_does_not_express_are_named() -> None:
    values = usual("mistral", 26, 2304, 8, 4, 9216, 256000, attention_bias=True)
    assert read_shape(values, "config.json")[1] == ["attention_bias=true"]
    values = usual("qwen2", 2, 64, 4, 2, 128, 500, layer_types=["full_attention", "chunked_attention"])
    assert "layer_types" in read_shape(values, "config.json")[1][0]
    assert "add_cross_attention" in read_shape(GPT2 | {"add_cross_attention": True}, "config.json")[1][0]


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, "12", 1.5])
def test_a_size_that_is_missing_or_not_a_size_is_named(key: str, value: object) -> None:
    names = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads"}
    with pytest.raises(UserError, match=names.get(key, key)):
        read_shape(GPT2 | {key: value}, "config.json")


def test_a_model_that_can_only_be_counted_is_not_trained() -> None:
    with pytest.raises(UserError, match="mixtral") as refusal:
        from_config(MIXTRAL, "config.json")
    assert refusal.value.where == "config.json"


def test_a_config_of_transformers_4_is_read() -> None:
    read = from_config(LLAMA, "config.json")
    assert (read.rope_theta, read.head_dim, read.rope_scaling) == (500000.0, 128, RopeScaling())
    read = from_config({**LLAMA, "rope_scaling": None, "num_key_value_heads": None}, "config.json")
    assert (read.rope_theta, read.rope_scaling, read.kv_heads) == (500000.0, None, 32)
    assert (read.norm_eps, read.max_positions, read.init_std) == (1e-5, 131072, 0.02)
    assert Shape.of(read) == read_shape({**LLAMA, "num_key_value_heads": 32}, "config.json")[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_written_is_read_back(family: str) -> None:
    written = config(family)
    assert to_config(from_config(written, "config.json"), family, 0, "float32") == written
    scaled = from_config(written, "config.json").model_copy(update={"rope_scaling": RopeScaling(factor=4.0)})
    assert from_config(to_config(scaled, family, 0, "float32"), "config.json") == scaled


SCALING = {"rope_type": "llama3", **LLAMA["rope_scaling"]}
SAME_ROPE: dict[str, dict[str, Any]] = {
    "transformers 4": {"rope_theta": 5e5, "rope_scaling": SCALING},
    "transformers 4, older": {"rope_theta": 500000, "rope_scaling": {**SCALING, "type": "llama3"}},
    "transformers 5": {"rope_parameters": {**SCALING, "rope_theta": 5e5}},
    "theta in the older table": {"rope_scaling": {**SCALING, "rope_theta": 5e5}},
    "both": {"rope_theta": 5e5, "rope_scaling": SCALING, "rope_parameters": {**SCALING, "rope_theta": 5e5}},
    "the length at the top": {
        "rope_theta": 5e5,
        "rope_scaling": {k: v for k, v in SCALING.items() if k != "original_max_position_embeddings"},
        "original_max_position_embeddings": 8192,
    },
}
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "rope_theta is 10000.0 in config.json and 500000.0 in rope_parameters": {"rope_theta": 1e4},
    "rope_type is 'default' in rope_scaling and 'llama3' in rope_parameters": {"rope_scaling": None},
    "factor is 4.0 in rope_scaling and 8.0 in rope_parameters": {"rope_scaling": {**SCALING, "factor": 4.0}},
    "rope_type is 'llama3' in rope_scaling and 'linear' in rope_scaling.type": {
        "rope_scaling": {**SCALING, "type": "linear"}
    },
    "original_max_position_embeddings is 4096 in config.json and 8192 in rope_parameters": {
        "original_max_position_embeddings": 4096
    },
    "rope_scaling is not one table of numbers": {"rope_scaling": {"full_attention": SCALING}},
}


@pytest.mark.parametrize("case", SAME_ROPE)
def test_rope_is_read_from_wherever_it_is(case: str) -> None:
    plain = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    read = from_config(plain | SAME_ROPE[case], "config.json")
    assert (read.rope_theta, read.rope_scaling) == (500000.0, RopeScaling())


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_a_folder_whose_two_dialects_contradict_each_other_is_refused(said: str) -> None:
    """As a hand edits it, or as transformers 4 saves what it did not read: next to its own default."""
    plain = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    new = {"rope_parameters": {**SCALING, "rope_theta": 5e5}}
    with pytest.raises(UserError, match=re.escape(said)):
        from_config(plain | new | CONTRADICTIONS[said], "config.json")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a different architecture": ("llama", {"model_type": "gemma3"}, "gemma3"),
    "biases in Llama": ("llama", {"attention_bias": True}, "attention_bias"),
    "biases in the feed-forward": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "a different activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    "a window": ("mistral", {"sliding_window": 512}, "sliding_window"),
    "a window in some layers": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "a window in use": ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window"),
    "other frequencies": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    "other frequencies, old form": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "half-rotated heads": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "no width": ("llama", {"hidden_size": None}, "hidden_size"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
    "biases in a family that transformers gives none": ("mistral", {"attention_bias": True}, "attention_bias"),
    "a part of a larger model": ("llama", {"text_config": config("llama")}, "all but the text model"),
    "layer kinds that are not a list": ("llama", {"layer_types": 5}, "layer_types"),
    "an epsilon in quotes": ("llama", {"rms_norm_eps": "1e-5"}, "norm_eps"),
    "quantized weights": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_the_same_is_refused(case: str) -> None:
    family, change, named = REFUSED[case]
    with pytest.raises(UserError) as caught:
        from_config(config(family) | change, "model/config.json")
    assert named in str(caught.value)
    assert caught.value.where == "model/config.json"
    assert caught.value.remedy


def test_a_window_as_long_as_the_context_is_not_a_window() -> None:
    values = config("mistral")
    longest = values["max_position_embeddings"]
    assert from_config(values | {"sliding_window": longest}, "config.json") == from_config(values, "config.json")
    del values["sliding_window"]  # then transformers assumes 4096
    with pytest.raises(UserError, match="sliding_window=4096"):
        from_config(values, "config.json")
