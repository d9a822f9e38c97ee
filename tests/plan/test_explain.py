"""`minka plan explain`: every key of a plan's JSON has an entry that can be read alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from measured_runs import learning_run, planned_run, table_of_runs, written_run
from minka.__main__ import main
from minka.plan.explain import EXPLAINED, MODEL, OPEN, explain
from minka.plan.flops import FORMULAS

DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 7, "num_nextn_predict_layers": 1}
GEMMA = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 7}}


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a document; those below another with a dot."""
    if isinstance(value, list):
        for item in value:
            yield from keys(item, prefix)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield prefix + key
            yield from keys(inner, f"{prefix}{key}.")


def documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    for values in (DEEPSEEK, GEMMA):
        (tmp_path / "config.json").write_text(json.dumps(values))
        yield planned(capsys, "model", "--hf", str(tmp_path))
    yield planned(capsys, "model", "--recipe", "demo")
    yield planned(capsys, "memory", "llama3-8b", "--world", "8", "--gpu", "H100-SXM")
    yield planned(capsys, "memory", "llama3-8b", "layout.pipeline=2", "--world", "8")
    yield planned(capsys, "time", "llama3-8b", "--world", "8", "--gpu", "H100-SXM", "--dollars", "2")
    yield planned(capsys, "layout", "dense-1b", "--world", "2", "--gpu", "H100-SXM")
    run = written_run(tmp_path, "one", 1.0, "NVIDIA H200")
    yield planned(capsys, "calibrate", run, "-o", str(tmp_path / "rates.toml"))
    yield planned(capsys, "budget", "--days", "3", "--gpu", "H100-SXM", "--unique-tokens", "1e10")
    yield planned(capsys, "fit", table_of_runs(tmp_path / "runs.csv"), "--bootstraps", "9")
    yield planned(capsys, "ladder", "--flops", "1e20")
    yield planned(capsys, "cadence", "--gpus", "64", "--run", "dense-125m")
    yield planned(capsys, "score", planned_run(tmp_path, "three", loss=2.3))
    yield planned(capsys, "check", learning_run(tmp_path, "two"), "--loss", "2")


def test_every_key_of_every_plan_is_explained_and_every_explained_key_is_in_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {key for document in documents(tmp_path, capsys) for key in keys(document)}
    for key in found:
        assert all(explain(key)), key
    missing = EXPLAINED.keys() - found
    assert missing == set()
    assert {"shape", "uncounted", "trainable", "ranks", "ranks.peak_bytes", "seq_len", "world", "layout"} <= found


@pytest.mark.parametrize("key", EXPLAINED)
def test_every_entry_stands_alone(key: str) -> None:
    entry = EXPLAINED[key]
    for text in entry:
        assert not re.search(r"^(the same|both|all of them)$", text), text
    assert entry.source != entry.formula


LETTERS = {"causal": "LdhkefsV", "palm": "NLhes", "6n": "N", "megatron": "LdhkefsV"}


@pytest.mark.parametrize("convention", FORMULAS)
def test_the_inputs_of_flops_are_the_letters_of_their_formula(convention: str) -> None:
    entry = explain(f"training_flops_per_token.{convention}")
    assert set(re.findall(r"(?:^|, )([A-Za-z]) ", entry.inputs)) == set(LETTERS[convention])
    assert all(letter in entry.formula for letter in LETTERS[convention])


def test_a_key_is_found_by_its_end_and_a_wrong_one_by_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("peak_bytes") == EXPLAINED["ranks.peak_bytes"]
    assert explain("peak_bytes_by_kind.logits") == EXPLAINED["ranks.peak_bytes_by_kind.logits"]
    assert explain("defaults.vocab_size") == EXPLAINED["defaults"]
    assert planned(capsys, "explain", "parameters")["formula"] == EXPLAINED["parameters"].formula
    assert "parameters" in refused(capsys, "explain", "paramters")
    assert "shape.layers" in refused(capsys, "explain", "shape.layer")


def test_the_page_lists_the_keys_of_a_model(root: Path) -> None:
    page = (root / "docs/plan.md").read_text()
    for key in MODEL:
        if "." not in key or key.startswith("training_flops"):
            assert f"`{key}`" in page, key
    assert set(OPEN) <= EXPLAINED.keys()
    for name in FORMULAS:
        assert f"| `{name}` |" in page, name
