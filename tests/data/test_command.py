"""`minka data`: its output for people and for machines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import run_config
from minka.data.command import main
from minka.data.loader import Loader, LoaderState
from minka.data.token_store import TokenStore

OVERRIDES = ["data.tokenizer=bytes", "model.vocab=256", "data.source=jsonl", "data.validation_fraction=0.1"]


@pytest.fixture
def arguments(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run that reads the small corpus, from an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return ["demo", *OVERRIDES, f'data.paths=["{corpus}"]']


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON a command prints."""
    assert main([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_prepare_inspect_and_verify_agree(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = ask(capsys, "prepare", *arguments)
    assert made["prepared"]
    assert not ask(capsys, "prepare", *arguments)["prepared"]
    store = TokenStore.open(Path(made["store"]))
    assert (made["hash"], made["vocab"], made["eod"]) == (store.hash, 256, 255)
    for where in ([made["store"]], arguments):
        seen = ask(capsys, "inspect", *where)
        assert seen == {key: value for key, value in made.items() if key != "prepared"}
        checked = ask(capsys, "verify", *where)
        assert (checked["ok"], checked["train"]["tokens"]) == (True, made["train"]["tokens"])


def test_inspect_shows_a_document_with_its_provenance_and_text(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = TokenStore.open(Path(ask(capsys, "prepare", *arguments)["store"]))
    split = store.split("validation")
    seen = ask(capsys, "inspect", str(store.folder), "--document", "2", "--split", "validation")
    assert seen == {"document": 2, "split": "validation", **split.provenance(2), "text": split.text_of(2)}


def test_inspect_shows_the_documents_the_loader_trained_on(
    arguments: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["data.seq_len=32", "data.batch_tokens=128", "run.seed=5", "data.dropped_samples=[[4, 6]]"]
    store = TokenStore.open(Path(ask(capsys, "prepare", *arguments)["store"]))
    split = store.split("train")
    data = {**store.manifest.source, "seq_len": 32, "batch_tokens": 128, "dropped_samples": [[4, 6]]}
    config = run_config(run={"name": "x", "max_steps": 9, "seed": 5}, data=data)
    with Loader(config, split, 0, 1, LoaderState(samples=2, tokens=64)) as loader:
        batch = next(loader).batch
    assert batch.samples.tolist() == [2, 3, 6, 7]
    for sample, tokens in zip(batch.samples.tolist(), batch.tokens, strict=True):
        seen = ask(capsys, "inspect", *arguments, "--sample", str(sample))
        cut = [split.document(p["document"])[p["first"] : p["last"]] for p in seen["pieces"]]
        assert np.concatenate(cut).tolist() == tokens.tolist()[: sum(map(len, cut))]
        assert all(p["provenance"] == split.provenance(p["document"]) for p in seen["pieces"])
        assert not seen["dropped"]
    assert ask(capsys, "inspect", *arguments, "--sample", "5")["dropped"]


def test_plain_output_names_the_store_and_provenance(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    store = ask(capsys, "prepare", *arguments)["store"]
    for command in ("prepare", "verify", "inspect"):
        assert main([command, *arguments]) == 0
        assert store in capsys.readouterr().out
    assert main(["inspect", *arguments, "--document", "0"]) == 0
    assert "https://x.test/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["inspect", "demoo"], "'demo'"),
        (["verify", "."], "manifest.json"),
        (["inspect", ".", "data.max_bytes=1"], "overrides"),
        (["prepare", "demo", "data.sauce=text"], "data.source"),
        (["prepare", "demo", "data.source=text"], "paths"),
    ],
)
def test_mistakes_are_one_paragraph_and_status_2(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sample_needs_a_run_and_a_document_is_not_a_sample(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = ask(capsys, "prepare", *arguments)["store"]
    for argv, says in (
        (["inspect", store, "--sample", "1"], "RUN --sample 1"),
        (["inspect", *arguments, "--sample=-1"], "-1"),
        (["inspect", *arguments, "--sample", "1", "--document", "1"], "--sample"),
        (["inspect", store, "--document", "5000"], "5000"),
        (["inspect", store, "--document", "0", "--split", "test"], "'test'"),
        (["inspect", store, "--split", "validation"], "--document"),
    ):
        assert main(argv) == 2
        assert says in capsys.readouterr().err


def test_help_imports_nothing_heavy(source_environment: dict[str, str]) -> None:
    code = (
        "import sys; from minka.data.command import main; status = main(['prepare', '--help']); "
        "heavy = {'torch', 'numpy', 'pyarrow', 'datasets', 'tokenizers', 'transformers'} & set(sys.modules); "
        "print(heavy, file=sys.stderr); sys.exit(status or bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=source_environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
