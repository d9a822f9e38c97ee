"""Damaged stores and stores that do not fit the run are refused with what is wrong and what would work."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import data_section, run_config
from minka.data.prepare import check_store
from minka.data.store_manifest import hash_files, read_manifest, write_manifest
from minka.data.token_store import TokenStore
from minka.data.verify import verify
from minka.plan.errors import UserError
from minka.plan.store_files import MANIFEST, check_store_files


@pytest.fixture
def copy(store: TokenStore, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(store.folder, tmp_path / "copy"))


@pytest.mark.parametrize("damage", ["", "{", '{"format": 2}', "[]", '{"format": 1}', "other splits", "one split"])
def test_a_damaged_manifest_is_refused(damage: str, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    train = manifest["splits"]["train"]
    splits = {"other splits": {"train": train, "test": train}, "one split": {"train": train}}
    text = json.dumps(manifest | {"splits": splits[damage]}) if damage in splits else damage
    (copy / MANIFEST).write_text(text)
    for ask in (TokenStore.open, verify):
        with pytest.raises(UserError, match=MANIFEST) as caught:
            ask(copy)
        assert caught.value.where in (str(copy), str(copy / MANIFEST))
        assert "prepare" in caught.value.remedy


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.parquet", "tokenizer/tokenizer.json"])
def test_a_file_that_was_cut_short_or_deleted_is_refused_when_the_store_is_opened(name: str, copy: Path) -> None:
    os.truncate(copy / name, (copy / name).stat().st_size - 3)
    for ask in (TokenStore.open, verify):
        with pytest.raises(UserError, match=f"{name} has .* where the manifest says"):
            ask(copy)
    (copy / name).unlink()
    for ask in (TokenStore.open, verify):
        with pytest.raises(UserError, match=f"{name} is missing"):
            ask(copy)


def reseal(folder: Path, **changes: Any) -> None:
    """Hash the files again, so that the damage shows only in their meaning."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={**changes, "files": hash_files(folder)}))


def change_tokens(copy: Path, change: Callable[[Any], None]) -> None:
    """Change train.bin in place and hash it again."""
    tokens = np.fromfile(copy / "train.bin", dtype="<u2")
    change(tokens)
    tokens.tofile(copy / "train.bin")
    reseal(copy)


def test_one_flipped_bit_is_found_by_verify(copy: Path) -> None:
    raw = bytearray((copy / "train.bin").read_bytes())
    raw[100] ^= 1
    (copy / "train.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"train.bin .*sha256"):
        verify(copy)


@pytest.mark.parametrize("prefix", ["tokenizer/", "validation.", "train.bin"])
def test_some_files_are_checked_by_themselves(prefix: str, copy: Path) -> None:
    check_store_files(copy, prefix)
    name = next(name for name in read_manifest(copy).files if name.startswith(prefix))
    raw = bytearray((copy / name).read_bytes())
    raw[9] ^= 1
    (copy / name).write_bytes(raw)
    with pytest.raises(UserError, match=f"{name} has changed"):
        check_store_files(copy, prefix)
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be read: Is a directory"):
        check_store_files(copy, prefix)
    with pytest.raises(UserError, match=f"manifest.json lists no file x{prefix}"):
        check_store_files(copy, f"x{prefix}")


def test_an_additional_file_is_found_by_verify(copy: Path) -> None:
    (copy / "stray").write_text("x")
    with pytest.raises(UserError, match="stray"):
        verify(copy)


def test_a_token_beyond_the_vocabulary_is_found_by_verify(copy: Path) -> None:
    change_tokens(copy, lambda tokens: tokens.__setitem__(7, 256))
    with pytest.raises(UserError, match=r"token 7 \(document 0\) is 256, beyond the vocabulary of 256"):
        verify(copy)


def test_a_missing_end_of_document_is_found_by_verify(copy: Path) -> None:
    split = TokenStore.open(copy).split("train")
    end, documents = int(split.index.lengths[:4].sum()) - 1, split.n_documents
    change_tokens(copy, lambda tokens: tokens.__setitem__(end, 65))
    with pytest.raises(UserError, match=f"{documents - 1} end-of-document tokens for {documents} documents"):
        verify(copy)


def test_an_additional_end_of_document_is_found_by_verify(copy: Path) -> None:
    documents = TokenStore.open(copy).split("train").n_documents
    change_tokens(copy, lambda tokens: tokens.__setitem__(1, 255))
    with pytest.raises(UserError, match=f"{documents + 1} end-of-document tokens for {documents} documents"):
        verify(copy)


def test_text_that_differs_from_what_was_hashed_is_found_by_verify(copy: Path) -> None:
    change_tokens(copy, lambda tokens: tokens.__setitem__(0, 65))
    with pytest.raises(UserError, match="train: document 0 decodes"):
        verify(copy)


def test_a_sidecar_of_a_different_split_is_found_by_verify(copy: Path) -> None:
    shutil.copy(copy / "validation.parquet", copy / "train.parquet")
    reseal(copy)
    with pytest.raises(UserError, match=r"the sidecar has .* rows for"):
        verify(copy)
    with pytest.raises(UserError, match=r"the sidecar has .* rows for"):
        _ = TokenStore.open(copy).split("train").document_bytes


def test_a_damaged_index_is_refused(copy: Path) -> None:
    raw = (copy / "train.idx").read_bytes()
    for damaged, says in ((b"MMXXXXX" + raw[7:], "Megatron"), (raw[:-8], str(len(raw) - 8)), (b"", "read")):
        (copy / "train.idx").write_bytes(damaged)
        reseal(copy)
        with pytest.raises(UserError, match=says) as caught:
            TokenStore.open(copy).split("train")
        assert caught.value.where == str(copy / "train.idx")


@pytest.mark.parametrize(
    ("fields", "model", "says"),
    [
        ({"tokenizer": "bpe"}, {"vocab": 256}, "'bytes'.*'bpe'"),
        ({"paths": ["elsewhere.jsonl"]}, {}, "data.paths is"),
        ({"max_bytes": 77}, {}, "data.max_bytes is 0, the run has 77"),
    ],
)
def test_a_store_with_different_settings_than_the_run_is_refused(
    fields: dict[str, Any], model: dict[str, Any], says: str, store: TokenStore
) -> None:
    data = data_section(**store.manifest.source).model_dump() | {"seq_len": 8, "batch_tokens": 32}
    check_store(store, run_config(data=data))
    check_store(store, run_config(data={"tokenizer": "bytes", "store": "x", "seq_len": 8, "batch_tokens": 32}))
    shape = run_config().model.model_dump() | model
    with pytest.raises(UserError, match=says) as caught:
        check_store(store, run_config(data=data | fields, model=shape))
    assert "data.store" in caught.value.remedy


@pytest.mark.parametrize(("vocab", "says"), [(290, "300 entries.* 290 rows"), (310, "300 entries.* 310 rows")])
def test_a_store_with_a_different_vocabulary_than_the_model_is_refused(
    vocab: int, says: str, bpe_store: TokenStore
) -> None:
    data = data_section(**bpe_store.manifest.source).model_dump() | {"seq_len": 8, "batch_tokens": 32}
    shape = run_config().model.model_dump() | {"vocab": vocab}
    with pytest.raises(UserError, match=says):
        check_store(bpe_store, run_config(data=data, model=shape))
