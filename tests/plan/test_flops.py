"""Counts are exact: published parameter counts, and published MFU from published throughput."""

import ast
import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from minka.plan.config_sections import ModelSection
from minka.plan.flops import FORMULAS, Shape, formula_of, parameters, symbols_of, training_flops_per_token
from minka.plan.hardware import find_gpu
from minka.plan.hub_defaults import FAMILIES
from minka.plan.hub_shape import read_shape
from minka.plan.load_config import load_run

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
MODELS = list(csv.DictReader((GOLDENS / "model_shapes.csv").read_text().splitlines()))
THROUGHPUT = list(csv.DictReader((GOLDENS / "mpt_h100_bf16_throughput.csv").read_text().splitlines()))
BIASES: dict[str, Literal["none", "qkv", "all"]] = {"no": "none", "qkv": "qkv", "all-biases": "all"}


def golden_shape(row: dict[str, str]) -> Shape:
    """A row of model_shapes.csv."""
    sizes: dict[str, Any] = {
        key: int(row[key]) for key in ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab")
    }
    return Shape(
        **sizes,
        tied=row["tied"] == "yes",
        biases=BIASES[row["qkv_bias"]],
        qk_norm=row["qk_norm"] == "per-head",
        mlp_matrices=3 if row["mlp"] == "swiglu" else 2,
        learned_positions=int(row["position"].removeprefix("learned-")) if row["position"] != "rope" else 0,
    )


def mpt_shape(row: dict[str, str]) -> Shape:
    """A row of mpt_h100_bf16_throughput.csv; goldens/README.md gives what the columns leave out."""
    d = int(row["d_model"])
    return Shape(
        layers=int(row["layers"]),
        d_model=d,
        heads=int(row["heads"]),
        kv_heads=int(row["heads"]),
        head_dim=d // int(row["heads"]),
        d_ff=4 * d,
        vocab=50368,
        tied=True,
        biases="all",
        mlp_matrices=2,
        learned_positions=int(row["seq_len"]),
    )


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row["model"])
def test_published_models_have_exactly_the_published_number_of_parameters(row: dict[str, str]) -> None:
    assert parameters(golden_shape(row)) == int(row["params"])


@pytest.mark.parametrize("row", [row for row in MODELS if row["position"] == "rope"], ids=lambda row: row["model"])
def test_a_model_section_counts_as_its_shape_does(row: dict[str, str]) -> None:
    shape = golden_shape(row)
    section = ModelSection(
        layers=shape.layers,
        d_model=shape.d_model,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        d_ff=shape.d_ff,
        vocab=shape.vocab,
        tied=shape.tied,
        qkv_bias=shape.biases == "qkv",
        qk_norm=shape.qk_norm,
    )
    assert Shape.of(section) == shape
    assert parameters(section) == int(row["params"])


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_the_llama_recipes_have_the_published_shapes(size: str) -> None:
    row = next(row for row in MODELS if row["model"] == f"llama3-{size}")
    model = load_run(f"llama3-{size}").config.model
    assert Shape.of(model) == golden_shape(row)
    assert (model.rope_theta, model.max_positions) == (500_000.0, 8192)


@pytest.mark.parametrize("row", THROUGHPUT, ids=lambda r: f"{r['model']}-{r['seq_len']}-{r['gpus']}")
def test_published_mfu_follows_from_published_throughput(row: dict[str, str]) -> None:
    shape, gpu = mpt_shape(row), find_gpu("H100-SXM")
    assert gpu is not None
    assert parameters(shape) == int(row["params"])
    each = int(row["tokens_per_second_per_gpu"])
    least, most = (
        100 * rate * training_flops_per_token(shape, int(row["seq_len"]), "palm") / gpu.peak_flops
        for rate in (each, each + 1)  # tokens a second are cut to whole ones, MFU is rounded to 0.01 %
    )
    assert least - 0.005 <= float(row["mfu_percent_6N_plus_12Lds"]) <= most + 0.005


def test_causal_flops_agree_with_a_count_of_each_product() -> None:
    """The same number, added up matrix by matrix and query by query."""
    shape = Shape(layers=3, d_model=64, heads=4, kv_heads=2, head_dim=24, d_ff=160, vocab=512)
    d, q, kv, f, s = 64, 96, 48, 160, 16
    layer = sum(2 * rows * columns for rows, columns in [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)])
    seen = sum(2 * (2 * q * keys) for keys in range(1, s + 1)) / s  # query t sees keys 1..t
    forward = 3 * (layer + seen) + 2 * d * 512
    diagonal = 3 * 3 * 2 * q  # the formula halves s^2 where the mask leaves s(s+1)/2
    assert training_flops_per_token(shape, s) == 3 * forward - diagonal


@pytest.mark.parametrize(
    ("model", "seq_len", "ratio"),  # 6N over the exact causal count, to three figures
    [
        ("llama2-7b", 4096, 0.943),
        ("llama3-8b", 8192, 0.936),
        ("llama3-405b", 8192, 0.965),
        ("llama3-405b", 131072, 0.602),
    ],
)
def test_six_n_misses_the_exact_count_by_as_much_as_is_known(model: str, seq_len: int, ratio: float) -> None:
    row = next(row for row in MODELS if row["model"] == model)
    exact = training_flops_per_token(golden_shape(row), seq_len)
    assert 6 * int(row["params"]) / exact == pytest.approx(ratio, abs=6e-4)


def evaluated(formula: str, symbols: Mapping[str, float]) -> float:
    """A formula as it is printed: letters and numbers next to each other are multiplied."""
    spelled = re.sub(r"(?<=[\w)])\s*(?=[A-Za-z(])", "*", formula)

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            both = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
            return left / right if isinstance(node.op, ast.Div) else both[type(node.op)]
        return symbols[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    return value(ast.parse(spelled, mode="eval").body)


def test_a_formula_is_evaluated_as_it_is_read() -> None:
    symbols = {"L": 2, "d": 3, "h": 4, "k": 1, "e": 5, "w": 6, "s": 9, "V": 7}
    assert evaluated("3(L(2d(h + k)e - ww/(2s)) + 2dV)", symbols) == 3 * (2 * (2 * 3 * 5 * 5 - 2) + 42)


VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"model_type": family, "num_hidden_layers": 7} for family in FAMILIES},
    "some dense": {"model_type": "qwen3_moe", "num_hidden_layers": 7, "decoder_sparse_step": 2},
    "queries directly": {"model_type": "deepseek_v3", "num_hidden_layers": 7, "q_lora_rank": None},
    "no shared experts": {"model_type": "deepseek_v3", "num_hidden_layers": 7, "n_shared_experts": 0},
    "no dense layers": {"model_type": "deepseek_v3", "num_hidden_layers": 7, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seq_len", [512, 8192])
def test_the_formula_of_a_model_gives_its_number(name: str, seq_len: int) -> None:
    """With windows and without, gated or not, with experts, with latent attention."""
    shape, _ = read_shape(VARIANTS[name], "config.json")
    symbols = symbols_of(shape, seq_len)
    formulas = {convention: formula_of(shape, seq_len, convention) for convention in FORMULAS}
    for convention, formula in formulas.items():
        exact = training_flops_per_token(shape, seq_len, convention)
        assert evaluated(formula, symbols) == pytest.approx(exact, rel=1e-12), formula
    assert set(re.findall(r"[A-Za-z]", "".join(formulas.values()))) == symbols.keys()
