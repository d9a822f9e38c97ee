"""An export is the same model for every reader: each of them looks for RoPE's numbers in a place of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from configs import values
from minka.data.tokenizer import bytes_tokenizer
from minka.model.hub_folder import write_folder
from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError
from minka.plan.hub_config import read_config, to_config
from minka.plan.hub_family import TRAINED, family_of, reader_limits
from minka.plan.load_config import validate
from models import load_theirs, model, plain, section

LLAMA3 = RopeScaling(factor=4.0, low_freq_factor=1.5, high_freq_factor=6.0, original_max_positions=16)
FAR: dict[str, Any] = {"rope_theta": 500_000.0, "rope_scaling": LLAMA3}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**FAR, "norm_eps": 1e-3},
    "llama, tied": {**FAR, "tied": True},
    "llama, wide heads": {**FAR, "head_dim": 20},
    "mistral": {"d_model": 50, "rope_theta": 500_000.0},
    "mistral, scaled": {**FAR, "d_model": 50},
    "qwen2": {**FAR, "qkv_bias": True},
    "qwen2, wide heads": {**FAR, "qkv_bias": True, "head_dim": 20},
    "qwen3": {**FAR, "qk_norm": True, "head_dim": 20, "norm_eps": 1e-3},
}
Rope = dict[str, float]  # theta and the four numbers of llama3's frequencies
Reader = Callable[[Mapping[str, Any]], Rope]
NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The newest 4 and an old one, with what they need beyond this environment's packages.
OLD = {
    "4.57.6": ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1"),
    "4.46.3": ("transformers==4.46.3", "huggingface-hub==0.26.5", "tokenizers==0.20.3"),
}
LACKING = {"4.46.3": ("mistral, scaled", "qwen2, wide heads", "qwen3")}  # that version has no such models
LOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__ == sys.argv[1]
tokens = load_file(sys.argv[2])["tokens"]
for folder in sys.argv[3:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        save_file({"logits": model.eval()(tokens).logits.contiguous()}, folder + ".logits")
    model.save_pretrained(folder + ".again")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a b").input_ids == [97, 32, 98], tokenizer
    assert model.config.eos_token_id == tokenizer.eos_token_id == 255
    assert model.generation_config.eos_token_id == 255
"""


def transformers_4(config: Mapping[str, Any]) -> Rope:
    """models/llama/configuration_llama.py, modeling_rope_utils.py: the top level alone."""
    return {"theta": config.get("rope_theta", 1e4), **numbers(config.get("rope_scaling") or {})}


def transformers_5(config: Mapping[str, Any]) -> Rope:
    """modeling_rope_utils.py, convert_rope_params_to_dict; vLLM reads what it returns (transformers_utils/config.py,
    patch_rope_parameters): the older table first, and a length at the top level before the table's."""
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    table = {"rope_theta": config.get("rope_theta", 1e4), **table}
    outer = {key: config[key] for key in NUMBERS[3:] if key in config}
    return {"theta": table["rope_theta"], **numbers({**table, **outer})}


def llama_cpp(config: Mapping[str, Any]) -> Rope:
    """conversion/base.py, TextModel; conversion/llama.py, generate_extra_tensors: the newer table, and the length at
    the top level alone."""
    table = config.get("rope_parameters", config.get("rope_scaling")) or {}
    outer = {NUMBERS[3]: config.get(NUMBERS[3], 8192)}
    return {"theta": table.get("rope_theta", config.get("rope_theta", 1e4)), **numbers({**table, **outer})}


def numbers(table: Mapping[str, Any]) -> Rope:
    return {key: table[key] for key in NUMBERS} if table.get("rope_type") == "llama3" else {}


@pytest.mark.parametrize("reader", [transformers_4, transformers_5, llama_cpp])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaling", [LLAMA3, None])
def test_every_reader_finds_the_same_rope(case: str, reader: Reader, scaling: RopeScaling | None) -> None:
    cfg = section(**CASES[case] | {"rope_scaling": scaling})
    found = reader(json.loads(json.dumps(to_config(cfg, "auto", 0, "bfloat16"))))
    scaled = dict(zip(NUMBERS, scaling.model_dump().values(), strict=True)) if scaling else {}
    assert found == {"theta": 500_000.0, **scaled}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_to_a_default_that_changed(case: str) -> None:
    """What is null or missing has had different defaults in different versions and readers."""
    cfg = section(**CASES[case])
    config = to_config(cfg, "auto", 0, "bfloat16")
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (config["head_dim"], config["num_key_value_heads"]) == (cfg.head_dim, cfg.kv_heads)
    assert config["architectures"] == [TRAINED[config["model_type"]]]
    assert int(config["transformers_version"].split(".")[0]) == 5  # else 4.57 calls the tokenizer broken
    if config["model_type"] != "llama":
        assert config["sliding_window"] is None
    if config["model_type"].startswith("qwen"):
        assert (config["layer_types"], config["max_window_layers"]) == (["full_attention"] * cfg.layers, cfg.layers)
        assert config["use_sliding_window"] is False


def test_what_a_reader_drops_is_said() -> None:
    """In a list of the cases that were measured or read; the rest has no limit."""
    said = {case: reader_limits(section(**fields)) for case, fields in CASES.items()}
    assert {case for case, text in said.items() if "llama.cpp" in text} == {"qwen2", "qwen2, wide heads", "qwen3"}
    assert {case for case, text in said.items() if "4.48" in text} == {"mistral, scaled"}
    assert reader_limits(section(qk_norm=True)) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)  # mostly pip's, on a busy machine
@pytest.mark.parametrize("version", OLD)
@torch.no_grad()
def test_transformers_4_loads_the_same_model(version: str, tmp_path: Path) -> None:
    """A second transformers, installed beside this one's torch. Needs the package index, as `make` does."""
    install(OLD[version], tmp_path / "site")
    bytes_tokenizer().save(tmp_path / "tokenizer")
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    expected = {}
    for case in CASES.keys() - set(LACKING.get(version, ())):
        ours, out = model(section(**CASES[case])), tmp_path / case
        assert family_of(ours.cfg) == case.split(",")[0]
        write_folder(out, ours.cfg, ours.named_parameters(), tokenizer=tmp_path / "tokenizer", eod_token=255)
        expected[out] = ours(*plain(tokens))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", LOAD, version, str(tmp_path / "tokens"), *map(str, expected)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "incorrect regex" not in done.stderr
    for out, logits in expected.items():
        theirs = load_file(f"{out}.logits")["logits"]
        torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5, msg=out.name)
        assert read_config(Path(f"{out}.again")) == read_config(out), out.name


def install(packages: tuple[str, ...], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), *packages], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 2),
            "d_model": st.integers(1, 40),
            "kv_heads": st.integers(1, 3),
            "head_dim": st.integers(1, 9).map(lambda half: 2 * half),
            "d_ff": st.integers(1, 40),
            "vocab": st.integers(256, 300),
            "tied": st.booleans(),
            "qkv_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "rope_theta": st.sampled_from([1.0, 1e4, 5e5]),
            "rope_scaling": st.sampled_from([None, LLAMA3.model_dump(), RopeScaling().model_dump()]),
            "norm_eps": st.sampled_from([1e-12, 1e-5, 0.1]),
            "max_positions": st.sampled_from([40, 8192]),
            "init_std": st.sampled_from([0.02, 1.0, 1.5]),
        }
    ),
    groups=st.integers(1, 3),
)
@torch.no_grad()
def test_every_run_that_is_accepted_is_exported_and_loads_with_the_same_logits(
    shape: dict[str, Any], groups: int
) -> None:
    written = values(model={**shape, "heads": shape["kv_heads"] * groups}, data={"tokenizer": "bpe"})
    if shape["qkv_bias"] and shape["qk_norm"]:
        with pytest.raises(UserError, match=r"set model.qkv_bias=false or model.qk_norm=false"):
            validate(written, "a test")
        written["checkpoint"] = {"export": False}
        validate(written, "a test")
        return
    cfg = validate(written, "a test").model
    ours = model(cfg)
    tokens = torch.randint(0, cfg.vocab, (1, 24), generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        write_folder(out, cfg, ours.named_parameters(), eod_token=0)
        assert read_config(out) == cfg.model_copy(update={"z_loss": 0.0})
        torch.testing.assert_close(ours(*plain(tokens)), load_theirs(out)(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_choice_of_family_is_by_shape() -> None:
    shapes: list[tuple[dict[str, Any], str]] = [
        ({}, "llama"),
        ({"d_model": 50}, "mistral"),
        ({"init_std": 1.5}, "mistral"),
        ({"qkv_bias": True, "d_model": 50}, "qwen2"),
        ({"qk_norm": True, "d_model": 50}, "qwen3"),
    ]
    for fields, family in shapes:
        cfg: ModelSection = section(**fields)
        assert (family_of(cfg), to_config(cfg, "auto", 0, "float32")["model_type"]) == (family, family)
