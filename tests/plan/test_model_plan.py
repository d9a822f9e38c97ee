"""`minka plan model`: exact counts, what they rest on and what they leave out; bad input is one paragraph."""

import json
from pathlib import Path
from typing import Any

import pytest

from minka.__main__ import main
from minka.plan.errors import UserError
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hub_config import read_config
from minka.plan.load_config import load_run

LLAMA = ["layers=32", "d_model=4096", "heads=32", "kv_heads=8", "d_ff=14336", "vocab=128256"]
HUB = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_sizes_a_recipe_and_a_config_count_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_run("llama3-8b").config.model
    by_sizes = planned(capsys, "model", *LLAMA, "--seq", "8192")
    by_recipe = planned(capsys, "model", "--recipe", "llama3-8b")
    assert by_sizes == by_recipe
    assert by_sizes["parameters"] == parameters(model) == 8_030_261_248
    assert by_sizes["parameters_embedding"] + by_sizes["parameters_non_embedding"] == by_sizes["parameters"]
    for name, value in by_sizes["training_flops_per_token"].items():
        assert value == training_flops_per_token(model, 8192, name)
    assert by_sizes["training_flops_per_token"].keys() == FORMULAS.keys()
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    by_file = planned(capsys, "model", "--hf", str(tmp_path / "config.json"))
    assert by_file == planned(capsys, "model", "--hf", str(tmp_path))
    sizes = ["layers=2", "d_model=64", "heads=4", "d_ff=128", "vocab=500"]
    assert by_file == planned(capsys, "model", *sizes, "--seq", "512")
    biased = planned(capsys, "model", *LLAMA, "qkv_bias=true", "--seq", "8192")
    assert biased["parameters"] == by_sizes["parameters"] + 32 * (4096 + 2 * 1024)
    assert biased == planned(capsys, "model", "--recipe", "llama3-8b", "model.qkv_bias=true")


UNTRAINABLE: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "biases": ({"attention_bias": True}, "attention_bias=true"),
    "window": ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64"),
    "vocabulary": ({"vocab_size": 100}, "vocab=100"),
    "family": ({"model_type": "mixtral"}, "'mixtral' is not an architecture that minka can train"),
}


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_what_run_start_from_refuses_is_not_trainable_and_says_why(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = UNTRAINABLE[case]
    (tmp_path / "config.json").write_text(json.dumps(HUB | change))
    with pytest.raises(UserError) as refusal:
        read_config(tmp_path)
    found = planned(capsys, "model", "--hf", str(tmp_path))
    assert not found["trainable"]
    assert reason in found["not_trainable_because"]
    assert refusal.value.what in found["not_trainable_because"]
    assert main(["plan", "model", "--hf", str(tmp_path)]) == 0
    assert reason in capsys.readouterr().out


def test_what_run_start_from_takes_is_trainable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nameless = {key: value for key, value in HUB.items() if key != "model_type"}
    for values in (HUB, nameless | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        read_config(tmp_path)
        found = planned(capsys, "model", "--hf", str(tmp_path))
        assert (found["trainable"], found["not_trainable_because"]) == (True, None)
    assert not planned(capsys, "model", *LLAMA[:-1], "vocab=100")["trainable"]


def test_sizes_that_a_file_leaves_out_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    found = planned(capsys, "model", "--hf", str(tmp_path))
    assert found["seq_len"] == 131072
    assert found["defaults"]["num_attention_heads"] == 8
    assert found["defaults"]["vocab_size"] == 262208
    assert not found["defaults"].keys() & text.keys()
    assert main(["plan", "model", "--hf", str(tmp_path)]) == 0
    assert "num_attention_heads=8" in capsys.readouterr().out
    assert planned(capsys, "model", "--recipe", "demo")["defaults"] == {}


def test_the_sequence_is_by_default_as_long_as_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500}
    silent = {key: value for key, value in HUB.items() if key != "max_position_embeddings"}
    for values, longest in ((gpt2 | {"n_positions": 77}, 77), (gpt2, 1024), (silent, 2048), (HUB, 512)):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert planned(capsys, "model", "--hf", str(tmp_path))["seq_len"] == longest
    for wrong in ("8192", -1, 0, None):
        (tmp_path / "config.json").write_text(json.dumps(HUB | {"max_position_embeddings": wrong}))
        assert "max_position_embeddings is " in refused(capsys, "model", "--hf", str(tmp_path))


def test_a_sequence_past_the_positions_is_counted_with_a_note_where_positions_rotate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe and a file alike. Learned positions are weights: there are no more of them."""
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    for model, longest in ((["--hf", str(tmp_path)], 512), (["--recipe", "llama3-8b"], 8192)):
        assert planned(capsys, "model", *model, "--seq", str(longest))["note"] is None
        found = planned(capsys, "model", *model, "--seq", "9000")
        assert f"positions end at {longest:,}" in found["note"]
        assert main(["plan", "model", *model, "--seq", "9000"]) == 0
        assert found["note"] in capsys.readouterr().out
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    said = refused(capsys, "model", "--hf", str(tmp_path), "--seq", "1025")
    assert "1,024 positions that the model has learned" in said


def test_latent_attention_has_no_width_of_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "num_hidden_layers": 7}))
    found = planned(capsys, "model", "--hf", str(tmp_path))
    assert found["shape"]["head_dim"] is None
    assert found["shape"]["latent"]["value_dim"] == 128
    assert "e" not in found["symbols"]


def test_the_formula_next_to_a_number_is_that_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    assert main(["plan", "model", "--hf", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3(L(2d(2h + 2k)e + 4df + 2she) + 2dV)" in said
    assert "6df" not in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give one model"),
        (["--recipe", "llama3-8b", "--hf", "x"], "give one model"),
        (["--recipe", "llama3-8b", "layers=2"], "layers"),
        (["--hf", "x", "layers=2"], "give one model"),
        (["layers=32"], "d_model, heads, d_ff, vocab missing. add d_model=... heads=... d_ff=... vocab=..."),
        (["layer=32", *LLAMA[1:]], "did you mean layers?"),
        (["layers=32", *LLAMA], "layers is given twice"),
        ([*LLAMA, "head_dim=127"], "head_dim=127 is odd"),
        ([*LLAMA[1:], "layers=" + "9" * 5000], "is above 2,147,483,647"),
        ([*LLAMA, "--seq", "9" * 400], "a sequence of"),
        (["layers=0", *LLAMA[1:]], "layers='0' is not an integer above 0"),
        (["layers=-3", *LLAMA[1:]], "layers='-3' is not an integer above 0"),
        (["layers=3.5", *LLAMA[1:]], "layers='3.5' is not an integer above 0"),
        ([*LLAMA, "tied=maybe"], "tied='maybe' is not true or false"),
        ([*LLAMA, "depth=3"], "'depth=3' is not a size of a model"),
        (["layers=2", "d_model=100", "heads=3", "d_ff=8", "vocab=10"], "d_model=100 is not a multiple of heads=3"),
        ([*LLAMA[:3], "kv_heads=5", *LLAMA[4:]], "kv_heads=5 does not divide heads=32"),
        (["--recipe", "lama3-8b"], "llama3-8b"),
        (["--hf", "nowhere"], "'nowhere' is not a local folder or file"),
        (["--hf", "meta-llama/Llama-3-8B"], "download it first (`hf download meta-llama/Llama-3-8B config.json"),
        (["--hf", "plan/recipes"], "this folder has no config.json"),
    ],
    ids=str,
)
def test_bad_input_is_one_paragraph(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "model", *words)
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"model_type": "mamba"}', '{"model_type": "llama"}'])
def test_a_config_that_is_none_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert str(file) in refused(capsys, "model", "--hf", str(file))
