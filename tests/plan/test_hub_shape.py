"""Any published decoder is counted as transformers builds it, and FLOPs as torch counts them on our model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from minka.model.attention import document_structure
from minka.model.transformer import Transformer
from minka.plan.config_sections import ModelSection
from minka.plan.flops import active_parameters, parameters, training_flops_per_token
from minka.plan.hub_shape import read_shape

SMALL = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 7, "vocab_size": 1003}
BUILT: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, wide heads": {"tie_word_embeddings": True, "head_dim": 40, "num_key_value_heads": 2},
    "llama, grouped": {**SMALL, "num_key_value_heads": 3, "intermediate_size": 250},
    "mistral": {},
    "mistral, odd heads": {**SMALL, "head_dim": 18, "num_key_value_heads": 2, "intermediate_size": 100},
    "qwen2": {},
    "qwen2, tied": {**SMALL, "tie_word_embeddings": True, "num_key_value_heads": 2, "intermediate_size": 64},
    "qwen3": {},
    "qwen3, tied": {**SMALL, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 32},
    "olmo2": {},
    "olmo2, grouped": {"num_key_value_heads": 4},
    "smollm3": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3_text, untied": {"tie_word_embeddings": False, "head_dim": 48},
    "mixtral": {},
    "mixtral, four experts": {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "qwen3_moe": {},
    "qwen3_moe, some dense": {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts_per_tok": 4},
    "deepseek_v3": {},
    "deepseek_v3, queries directly": {"q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2},
    "llama, all biases": {**SMALL, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "llama, biases of the feed-forward": {**SMALL, "mlp_bias": True},
    "smollm3, all biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3, biases": {"attention_bias": True},
    "olmo2, biases": {"attention_bias": True},
    "gemma, biases": {"attention_bias": True},
    "gemma2, biases": {"attention_bias": True},
    "gemma3_text, biases": {"attention_bias": True},
    "qwen3_moe, biases": {"attention_bias": True},
    "gpt_neox, no biases in attention": {"attention_bias": False},
    "gpt2": {},
    "gpt2, wide": {"n_inner": 100, "n_positions": 77},
    "gpt_neox": {},
    "phi3": {},
    "mixtral, one expert": {**SMALL, "num_local_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 2},
    "deepseek_v3, biases": {"attention_bias": True},
    "deepseek_v3, biases, queries directly": {"attention_bias": True, "q_lora_rank": None},
}  # fmt: skip

MTP = ["the multi-token prediction module (num_nextn_predict_layers=1)"]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", BUILT)
def test_counts_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    with quietly(), torch.device("meta"):
        config = AutoConfig.for_model(name.partition(",")[0], **{"num_hidden_layers": 7, **BUILT[name]})
        model: Any = AutoModelForCausalLM.from_config(config)
    shape, uncounted = read_shape(config.to_dict(), "config.json")
    assert uncounted == (MTP if "deepseek" in name else [])
    assert parameters(shape) == sum(weight.numel() for weight in model.parameters())


PUBLISHED = {  # all weights, and those that a token passes through, in billions, as the model cards print them
    "deepseek_v3": ({"num_hidden_layers": 61}, 671.0, 37.6),
    "mixtral": ({}, 46.7, 12.9),
    "qwen3_moe": ({"num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128, "num_experts": 128}, 30.5, 3.3),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_active_weights_are_those_that_were_published(family: str) -> None:
    """DeepSeek's report says 37B: without the embedding, which is 0.9."""
    settings, whole, active = PUBLISHED[family]
    with quietly():
        shape, _ = read_shape(AutoConfig.for_model(family, **settings).to_dict(), "config.json")
    assert parameters(shape) / 1e9 == pytest.approx(whole, abs=0.06)
    assert active_parameters(shape) / 1e9 == pytest.approx(active, abs=0.08)


def test_norms_of_phi_are_counted_and_its_head_bias_is_named() -> None:
    with quietly(), torch.device("meta"):
        config = AutoConfig.for_model("phi", **SMALL, qk_layernorm=True)
        model: Any = AutoModelForCausalLM.from_config(config)
    shape, uncounted = read_shape(config.to_dict(), "config.json")
    assert parameters(shape) == sum(weight.numel() for weight in model.parameters()) - SMALL["vocab_size"]
    assert uncounted == ["the bias of the head"]


def test_modules_that_transformers_does_not_build_are_named_where_the_file_has_them() -> None:
    values = {"model_type": "deepseek_v3", "num_hidden_layers": 7}
    assert read_shape(values, "x")[1] == []
    for absent in (0, None):
        assert read_shape(values | {"num_nextn_predict_layers": absent}, "x")[1] == []
    assert read_shape(values | {"num_nextn_predict_layers": 1}, "x")[1] == MTP
    assert read_shape(values | {"moe_layer_freq": 2}, "x")[1] == ["moe_layer_freq=2"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_window_that_is_asked_for_is_in_transformers_layers(family: str, listed: bool) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 13, "max_window_layers": 5}
    with quietly():
        config: Any = AutoConfig.for_model(family, **settings)
    values = config.to_dict()
    if not listed:
        del values["layer_types"]
    shape, _ = read_shape(values, "config.json")
    assert (shape.window, shape.windowed_layers) == (64, config.layer_types.count("sliding_attention"))
    assert shape.windowed_layers


def test_layers_with_a_window_are_counted_as_transformers_lays_them_out() -> None:
    for family in ("gemma2", "gemma3_text"):
        with quietly():
            config: Any = AutoConfig.for_model(family, num_hidden_layers=13)
        values = config.to_dict()
        shape, _ = read_shape(values, "config.json")
        assert shape.windowed_layers == config.layer_types.count("sliding_attention")
        del values["layer_types"]  # as configurations of older versions: by the pattern
        assert read_shape(values, "config.json")[0] == shape


def test_a_window_costs_what_its_tokens_see() -> None:
    """By hand: tokens 0 to 3 of eight see themselves and up to two before; half of the unmasked pairs is the rest."""
    shape, _ = read_shape(AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=64).to_dict(), "x")
    assert (shape.window, shape.windowed_layers) == (64, 1)
    s, wide = 256, 3 * 2 * shape.attention_width
    whole, cut = s / 2, (64 * s - 64 * 64 / 2) / s
    rest = training_flops_per_token(shape, 0)
    assert training_flops_per_token(shape, s) - rest == pytest.approx(wide * (whole + cut))
    assert training_flops_per_token(shape, 32) - rest == pytest.approx(wide * 2 * 16)


def test_a_text_model_within_a_larger_one_is_counted_and_the_rest_named() -> None:
    with quietly():
        text = AutoConfig.for_model("gemma3_text").to_dict()
    shape, uncovered = read_shape({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "config.json")
    assert shape == read_shape(text, "config.json")[0]
    assert uncovered == ["all but the text model of this gemma3"]


def test_a_text_model_that_leaves_out_sizes_is_what_transformers_builds() -> None:
    """The published gemma-3-4b-it has no more than this."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    values: dict[str, Any] = {"model_type": "gemma3", "text_config": {**text, "model_type": "gemma3_text"}}
    with quietly():
        whole: Any = AutoConfig.for_model(**values)
    shape, _ = read_shape(values, "config.json")
    assert shape == read_shape(whole.text_config.to_dict(), "config.json")[0]
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (8, 4, 256, 262208)
    values["text_config"] = text
    assert read_shape(values, "config.json")[0] == shape
    assert not read_shape(values | {"tie_word_embeddings": False}, "config.json")[0].tied
    seven = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    with quietly():
        assert (
            read_shape(seven, "x")[0] == read_shape(AutoConfig.for_model("llama", vocab_size=32064).to_dict(), "x")[0]
        )


SHAPES = [
    {"layers": 1, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "d_ff": 48},
    {"layers": 3, "d_model": 64, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 100, "tied": True},
    {"layers": 2, "d_model": 40, "heads": 6, "kv_heads": 2, "head_dim": 12, "d_ff": 64, "qk_norm": True},
    {"layers": 2, "d_model": 48, "heads": 3, "kv_heads": 1, "head_dim": 32, "d_ff": 20, "qkv_bias": True},
    {"layers": 5, "d_model": 16, "heads": 8, "kv_heads": 2, "head_dim": 4, "d_ff": 96, "vocab": 300},
]


@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: f"{sizes['layers']} x {sizes['d_model']}")
def test_flops_are_those_that_torch_counts_on_the_model(sizes: dict[str, Any]) -> None:
    """Of a step with attention written out, which computes all pairs: the causal convention counts half of them."""
    cfg, rows, length = ModelSection.model_validate({"vocab": 256, **sizes}), 2, 24
    model, tokens = Transformer(cfg), torch.randint(256, (rows, length))
    structure = document_structure(None, varlen=False).to(tokens.device, torch.float32)
    in_place: Any = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch forgets this one
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        positions = torch.arange(length).expand(rows, length)
        model(tokens, structure, positions, tokens).objective.backward()
    assert counter.get_total_flops() == training_flops_per_token(cfg, length, "megatron") * tokens.numel()
    of_all_pairs = training_flops_per_token(cfg, length, "megatron") - training_flops_per_token(cfg, length)
    assert training_flops_per_token(cfg, length) - of_all_pairs == training_flops_per_token(cfg, 0)
