"""Tokenizers that lose text say so at preparation, with how much; none that adds tokens does so in an export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from corpora import data_section, write_jsonl
from minka.data.prepare import prepare
from minka.data.store_manifest import read_manifest, write_manifest
from minka.data.token_store import TokenStore
from minka.data.verify import verify
from minka.plan.errors import UserError
from minka.plan.hub_tokenizer import copy_tokenizer
from vocabularies import EXACT, LOSSY, save_tokenizer

PLAIN = "the data are many "
ODD = "Loss É ﬁ\t\x1b"  # capital, accent, ligature, and characters that some vocabularies lack
TEXTS = [f"{PLAIN * (i % 3 + 1)}{ODD}{i}" for i in range(60)]


def prepared(kind: str, folder: Path, texts: list[str] = TEXTS) -> TokenStore:
    """A store of `texts`, by the tokenizer `kind`."""
    save_tokenizer(kind, folder / kind)
    file = write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts])
    fields = {"source": "jsonl", "paths": [str(file)], "tokenizer": str(folder / kind)}
    prepare(data_section(**fields, validation_fraction=0.3), 512, folder / "store")
    return TokenStore.open(folder / "store")


@pytest.mark.parametrize("kind", EXACT)
def test_a_tokenizer_that_has_every_byte_loses_none(kind: str, tmp_path: Path) -> None:
    store = prepared(kind, tmp_path)
    assert store.split("validation").lost_bytes.sum() == 0
    assert store.manifest.exact == (kind != "bytes_prefix")  # a space more is a different text that has all bytes
    assert store.manifest.lossy is None or store.manifest.lossy.lost == 0
    assert ("lossy" in (tmp_path / "store" / "manifest.json").read_text()) == (kind == "bytes_prefix")
    verify(store.folder)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("gaps", "LÉﬁ\t\x1b"),  # and the digits
        ("lower", "LÉ"),
        ("nfkc", "ﬁ"),
        ("accents", "É"),
        ("unknown", "É"),
        ("wordpiece", "LÉ"),
    ],
)
def test_what_a_tokenizer_loses_is_counted_by_document_and_shown(kind: str, lost: str, tmp_path: Path) -> None:
    store = prepared(kind, tmp_path)
    split, loss = store.split("validation"), store.manifest.lossy
    assert loss is not None
    assert (loss.tried, loss.differ) == (60, 60)
    assert loss.bytes == sum(part.bytes for part in store.manifest.splits.values())
    least = len(lost.encode())
    assert (split.lost_bytes >= least).all()
    if kind in ("lower", "nfkc", "accents"):
        assert split.lost_bytes.tolist() == [least] * split.n_documents
        assert loss.lost == 60 * least
    (note, *_) = store.manifest.notes
    assert all(said in note for said in ("60 of 60", "%", " became ", str(tmp_path / kind)))
    assert "\x1b" not in note
    old, new = loss.example
    assert any(old in text for text in TEXTS)
    assert old != new
    verify(store.folder)


def test_a_loss_in_validation_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minka.data.prepare.TRIED_DOCUMENTS", 1)
    store = prepared("lower", tmp_path, [f"the data {i}" for i in range(40)] + [f"A {i}" for i in range(40)])
    split = store.split("validation")
    capitals = [split.text_of(i).startswith("a") for i in range(split.n_documents)]
    assert 0 < sum(capitals) < split.n_documents
    assert split.lost_bytes.tolist() == np.array(capitals, float).tolist()
    assert not store.manifest.exact


def test_what_an_older_store_lost_is_unknown_and_said(tmp_path: Path) -> None:
    """It says that it is not exact, and not how much."""
    store = prepared("lower", tmp_path)
    (store.folder / "validation.lost").unlink()
    files = {name: file for name, file in store.manifest.files.items() if name != "validation.lost"}
    write_manifest(store.folder, store.manifest.model_copy(update={"lossy": None, "files": files}))
    old = TokenStore.open(store.folder)
    assert np.isnan(old.split("validation").lost_bytes).all()
    assert "not comparable" in old.manifest.notes[0]


def test_a_vocabulary_that_refuses_text_names_the_document(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot encode .*\[UNK\]") as caught:
        prepared("refuses", tmp_path, [PLAIN, PLAIN + "the", f"{PLAIN}É"])
    assert caught.value.where.endswith(":3")


@pytest.mark.parametrize("kind", [*EXACT, *LOSSY])
def test_transformers_encodes_a_store_s_tokenizer_and_an_export_s_as_the_store_does(kind: str, tmp_path: Path) -> None:
    store = prepared(kind, tmp_path)
    (tmp_path / "export").mkdir()
    copy_tokenizer(store.tokenizer_folder, tmp_path / "export")
    (tmp_path / "older").mkdir()
    copy_tokenizer(tmp_path / kind, tmp_path / "older")  # as a store of an older version has it
    adds = kind in ("roberta", "llama3", "llama2", "gaps", "wordpiece")
    for folder in (store.tokenizer_folder, tmp_path / "export", tmp_path / "older"):
        theirs = AutoTokenizer.from_pretrained(folder)
        for text, tokens in zip(TEXTS, store.tokenizer.encode(TEXTS), strict=True):
            assert theirs(text).input_ids == tokens.tolist()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config.get("add_bos_token", True) is not adds
        assert config.get("add_prefix_space", False) is (kind == "bytes_prefix")  # transformers 4 would leave it out
    assert store.manifest.added == (("<s>", "</s>") if adds else None)
    assert any("'<s>' and '</s>'" in note for note in store.manifest.notes) is adds


def test_a_tokenizer_that_adds_nothing_is_copied_as_it_is(tmp_path: Path) -> None:
    for kind in ("gpt2", "lower"):
        save_tokenizer(kind, tmp_path / kind)
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}_copy")
        (tmp_path / f"{kind}_out").mkdir()
        copy_tokenizer(tmp_path / kind, tmp_path / f"{kind}_out")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / f"{kind}_out" / file).read_bytes() == (tmp_path / kind / file).read_bytes()


def test_a_store_without_loss_has_the_manifest_it_always_had(store: TokenStore) -> None:
    written = json.loads((store.folder / "manifest.json").read_text())
    assert not {"lossy", "added"} & written.keys()
    assert read_manifest(store.folder).notes == []
