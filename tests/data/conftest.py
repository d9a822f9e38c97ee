"""A small corpus and the stores made from it."""

from pathlib import Path

import pytest

from corpora import data_section, texts, write_jsonl
from minka.data.prepare import prepare
from minka.data.token_store import TokenStore


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 200 documents from two sources, with provenance in its rows."""
    rows = [
        {"text": text, "id": f"doc-{i}", "source": "even" if i % 2 == 0 else "odd", "url": f"https://x.test/{i}"}
        for i, text in enumerate(texts(200))
    ]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The corpus as plain bytes, a tenth of it for validation."""
    folder = tmp_path_factory.mktemp("stores") / "bytes"
    prepare(data_section(source="jsonl", paths=[str(corpus)], validation_fraction=0.1), 256, folder)
    return TokenStore.open(folder)


@pytest.fixture(scope="session")
def bpe_store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The corpus with a trained vocabulary of 300."""
    folder = tmp_path_factory.mktemp("stores") / "bpe"
    section = data_section(source="jsonl", paths=[str(corpus)], validation_fraction=0.1, tokenizer="bpe")
    prepare(section, 300, folder)
    return TokenStore.open(folder)
