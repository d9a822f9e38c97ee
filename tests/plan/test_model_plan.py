"""`minka plan model` and `minka plan explain`: exact counts, and where they come from; bad input is one paragraph."""

import json
from pathlib import Path
from typing import Any

import pytest

from minka.__main__ import main
from minka.plan.explain import EXPLAINED, explain
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.load_config import load_run

LLAMA = ["layers=32", "d_model=4096", "heads=32", "kv_heads=8", "d_ff=14336", "vocab=128256"]
HUB = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
       "intermediate_size": 128, "vocab_size": 500, "max_position_embeddings": 512}  # fmt: skip


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


def test_a_model_that_is_only_counted_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**HUB, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = planned(capsys, "model", "--hf", str(tmp_path))
    assert not found["trainable"]
    assert found["parameters_active"] < found["parameters"]
    assert main(["plan", "model", "--hf", str(tmp_path)]) == 0
    assert "its architecture is counted only" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({**HUB, "attention_bias": True}))
    found = planned(capsys, "model", "--hf", str(tmp_path))
    assert (found["trainable"], found["uncounted"]) == (False, ["attention_bias=true"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give one model"),
        (["--recipe", "llama3-8b", "--hf", "x"], "give one model"),
        (["layers=32"], "d_model, heads, d_ff, vocab missing"),
        (["layers=0", *LLAMA[1:]], "layers='0' is not an integer above 0"),
        (["layers=-3", *LLAMA[1:]], "layers='-3' is not an integer above 0"),
        (["layers=3.5", *LLAMA[1:]], "layers='3.5' is not an integer above 0"),
        ([*LLAMA, "tied=maybe"], "tied='maybe' is not true or false"),
        ([*LLAMA, "depth=3"], "'depth=3' is not a size of a model"),
        (["layers=2", "d_model=100", "heads=3", "d_ff=8", "vocab=10"], "d_model=100 is not a multiple of heads=3"),
        ([*LLAMA, "kv_heads=5"], "kv_heads=5 does not divide heads=32"),
        (["--recipe", "llama3-8b", "--seq", "9000"], "longer than model.max_positions=8,192"),
        (["--recipe", "lama3-8b"], "llama3-8b"),
        (["--hf", "nowhere"], "nowhere"),
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


def test_every_number_of_a_plan_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "model", "--recipe", "demo")
    memory = planned(capsys, "memory", "llama3-8b", "--world", "8", "--gpu", "H100-SXM")
    for key in memory["ranks"][0]["peak_bytes_by_kind"]:
        assert explain(f"peak_bytes_by_kind.{key}")
    for key in ("peak_bytes", "moment", "margin_bytes", "gpu_bytes", "fits"):
        assert explain(key)
        assert key in memory["ranks"][0] or key in memory
    numbers = [key for key in found if key not in ("shape", "seq_len", "uncounted", "trainable")]
    for key in numbers:
        for name in [f"{key}.{inner}" for inner in found[key]] if isinstance(found[key], dict) else [key]:
            assert all(explain(name)), name
    assert planned(capsys, "explain", "parameters")["formula"] == EXPLAINED["parameters"].formula
    assert "training_flops_per_token.palm" in refused(capsys, "explain", "training_flops_per_token")
    assert "parameters" in refused(capsys, "explain", "paramters")


def test_the_page_lists_every_key(root: Path) -> None:
    page = (root / "docs/plan.md").read_text()
    for key in EXPLAINED:
        assert f"`{key}`" in page, key
    for name, formula in FORMULAS.items():
        assert f"| `{name}` |" in page, name
        assert formula, name
