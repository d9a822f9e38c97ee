"""Every setting of a config.json is of the right kind and size or refused by name; a missing one is transformers'."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minka.plan.errors import UserError
from minka.plan.hub_config import from_config
from minka.plan.hub_defaults import ALIASES, DEFAULTS, FAMILIES
from minka.plan.hub_settings import family_in, text_settings
from minka.plan.hub_shape import read_shape, shape_of

# Settings that transformers' classes take from other settings, or that a class has no field for.
NO_FIELDS = {"head_dim", "num_key_value_heads", "intermediate_size", "sliding_window_pattern"}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers_configuration_class(family: str) -> None:
    fields = {name: field.default for name, field in CONFIG_MAPPING[family].__dataclass_fields__.items()}
    aliases = {alias: usual for alias, usual in ALIASES.get(family, {}).items() if alias in fields}
    theirs = {aliases.get(name, name): default for name, default in fields.items()}
    ours = DEFAULTS[family]
    shared = ours.keys() & theirs.keys()
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    assert ours.keys() - theirs.keys() <= NO_FIELDS
    read_of_any_family = {key for settings in DEFAULTS.values() for key in settings}
    assert read_of_any_family & theirs.keys() <= ours.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_defaults_is_the_one_that_transformers_has(family: str) -> None:
    stated = {"model_type": family, "num_hidden_layers": 3}
    built = CONFIG_MAPPING[family](num_hidden_layers=3).to_dict()
    settings, _ = text_settings(stated, "config.json")
    assert shape_of(settings)[0] == read_shape(built, "config.json")[0]
    settings.size("max_position_embeddings")
    assert settings.assumed.keys() >= {"hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"}
    assert "num_hidden_layers" not in settings.assumed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_found_by_its_architecture(family: str) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] == FAMILIES[family].architecture
    assert family_in({"architectures": [FAMILIES[family].architecture]}, "config.json") == family


USUAL: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 4096, "num_attention_heads": 32}
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
         "intermediate_size", "max_position_embeddings", "num_local_experts", "num_experts_per_tok",
         "moe_intermediate_size", "decoder_sparse_step", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
         "qk_nope_head_dim", "v_head_dim", "sliding_window", "max_window_layers", "sliding_window_pattern",
         "no_rope_layer_interval", "first_k_dense_replace", "n_shared_experts")  # fmt: skip
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "qk_layernorm",
         "add_cross_attention", "use_bidirectional_attention")  # fmt: skip
LISTS = ("layer_types", "mlp_only_layers", "no_rope_layers")
ZERO_IS_A_SIZE = {"first_k_dense_replace", "n_shared_experts", "max_window_layers"}
WINDOWED = {"use_sliding_window": True, "sliding_window": 64}


def read(family: str, **changes: Any) -> None:
    """Read the shape and the positions of a model whose windows are in use."""
    asked = WINDOWED if "use_sliding_window" in DEFAULTS[family] else {}
    values = {"model_type": family, **USUAL, **asked, **changes}
    shape_of(settings := text_settings(values, "model/config.json")[0])
    settings.size("max_position_embeddings")


def refusal(family: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(family, **changes)
    assert caught.value.where == "model/config.json"
    assert caught.value.remedy
    return str(caught.value)


READ = [(family, key) for family, settings in DEFAULTS.items() for key in settings]


@pytest.mark.parametrize(("family", "key"), READ, ids="-".join)
def test_a_value_of_the_wrong_kind_is_refused(family: str, key: str) -> None:
    """All settings of all families: none is read without a check."""
    read(family)
    assert key in (*SIZES, *FLAGS, *LISTS)
    wrong: list[Any] = ["false", "8", [None], {}, 1.5]
    if key in SIZES:
        wrong += [True, -1, -8, 2**31, 10**400, *([] if key in ZERO_IS_A_SIZE else [0])]
    else:
        wrong += [0, 1]
    for value in wrong:
        assert key in refusal(family, **{key: value}), value


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads is 5, not a divisor of num_attention_heads=32"),
        ("llama", {"num_attention_heads": 33}, "num_attention_heads is 33, not a divisor of hidden_size=4,096"),
        ("llama", {"head_dim": 127}, "head_dim is 127, not even"),
        ("llama", {"hidden_size": 96}, "which makes heads 3 wide, an odd number"),
        ("qwen3", {"head_dim": None}, "head_dim is null"),
        ("gpt2", {"num_key_value_heads": 4}, "num_key_value_heads is 4, not 32"),
        ("gpt_neox", {"head_dim": 64}, "head_dim is 64, not 128"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, above 8"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "two names of one setting"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers"),
        ("deepseek_v3", {"first_k_dense_replace": 5}, "first_k_dense_replace is 5, above 4"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads is 8, not 32"),
        ("deepseek_v3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, not even"),
        ("deepseek_v3", {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "sliding_window is null"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False}, "use_sliding_window"),
        ("llama", {"text_config": "llama"}, "text_config"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("gemma3", {"text_config": {**USUAL, "tie_word_embeddings": True}, "tie_word_embeddings": False}, "tie_word"),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(family: str, changes: dict[str, Any], named: str) -> None:
    values = {"model_type": family, **USUAL, **changes}
    with pytest.raises(UserError) as caught:
        read_shape(values, "model/config.json")
    assert named in str(caught.value)
    assert caught.value.remedy


def test_what_a_family_does_not_read_is_ignored_as_transformers_does() -> None:
    plain = {"model_type": "llama", **USUAL}
    odd = {"num_experts": 8, "sliding_window": 16, "use_sliding_window": True, "qk_layernorm": True, "n_layer": 9}
    assert read_shape(plain | odd, "x") == read_shape(plain, "x")


def test_what_is_trained_and_what_is_counted_are_one_model() -> None:
    cfg = from_config({"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4}, "config.json")
    assert (cfg.layers, cfg.heads, cfg.head_dim, cfg.qk_norm, cfg.max_positions) == (4, 32, 128, True, 32768)


@pytest.mark.parametrize("values", [{}, {"model_type": "llama"}, {"model_type": "llama", "vocab_size": 500}], ids=str)
def test_a_file_that_states_no_size_is_not_a_model_of_defaults(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="missing"):
        text_settings(values, "config.json")
