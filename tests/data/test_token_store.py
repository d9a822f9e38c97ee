"""Token stores: Megatron's bytes exactly, documents that come back, and a sample traced to its documents."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from corpora import data_section, texts, write_jsonl
from minka.data import indexed_dataset, split_writer, token_store
from minka.data.document import content_hash
from minka.data.prepare import prepare
from minka.data.token_store import Split, TokenStore
from minka.plan.errors import UserError


def index_bytes(lengths: list[int], code: int, itemsize: int) -> bytes:
    """An .idx built from the layout, field by field."""
    raw = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    raw += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(lengths) + 1)
    raw += b"".join(struct.pack("<i", length) for length in lengths)
    raw += b"".join(struct.pack("<q", itemsize * sum(lengths[:i])) for i in range(len(lengths)))
    return raw + b"".join(struct.pack("<q", i) for i in range(len(lengths) + 1))


def write_index(path: Path, lengths: list[int], dtype: np.dtype[Any]) -> None:
    """Write an .idx as SplitWriter does."""
    with path.open("wb") as file:
        file.write(bytes(indexed_dataset.HEADER.size) + np.array(lengths, dtype="<i4").tobytes())
        indexed_dataset.finish_index(file, dtype)


def read_by_layout(folder: Path, name: str) -> list[list[int]]:
    """The documents of a .bin/.idx pair, read field by field without any of our code."""
    index, tokens = (folder / f"{name}.idx").read_bytes(), (folder / f"{name}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,), (code,) = struct.unpack_from("<Q", index, 9), struct.unpack_from("<B", index, 17)
    (sequences,), (documents,) = struct.unpack_from("<Q", index, 18), struct.unpack_from("<Q", index, 26)
    assert (version, documents) == (1, sequences + 1)
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    order = struct.unpack_from(f"<{documents}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert order == tuple(range(documents))
    letter = {8: "H", 4: "i"}[code]
    return [list(struct.unpack_from(f"<{n}{letter}", tokens, at)) for n, at in zip(lengths, pointers, strict=True)]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_store_is_megatrons_bytes_exactly(store: TokenStore, name: str) -> None:
    documents = read_by_layout(store.folder, name)
    split = store.split(name)
    assert documents == [split.document(i).tolist() for i in range(split.n_documents)]
    written = b"".join(struct.pack(f"<{len(tokens)}H", *tokens) for tokens in documents)
    assert (store.folder / f"{name}.bin").read_bytes() == written
    lengths = [len(tokens) for tokens in documents]
    assert (store.folder / f"{name}.idx").read_bytes() == index_bytes(lengths, code=8, itemsize=2)


@pytest.mark.parametrize(("vocab", "code", "itemsize"), [(256, 8, 2), (65_499, 8, 2), (65_500, 4, 4), (128_256, 4, 4)])
def test_tokens_are_u16_below_65500_entries_and_i32_from_there(
    vocab: int, code: int, itemsize: int, tmp_path: Path
) -> None:
    dtype = indexed_dataset.token_dtype(vocab)
    assert dtype.itemsize == itemsize
    write_index(tmp_path / "x.idx", [3, 1, 7], dtype)
    assert (tmp_path / "x.idx").read_bytes() == index_bytes([3, 1, 7], code, itemsize)
    index = indexed_dataset.read_index(tmp_path / "x.idx")
    assert (index.dtype, index.lengths.tolist()) == (dtype, [3, 1, 7])
    assert index.pointers.tolist() == [0, 3 * itemsize, 4 * itemsize]


def test_an_index_larger_than_one_block_is_written_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_dataset, "CHUNK", 4)
    lengths = [5, 2, 9, 1, 1, 3, 8, 8, 2, 4, 6]
    write_index(tmp_path / "x.idx", lengths, np.dtype("<u2"))
    assert (tmp_path / "x.idx").read_bytes() == index_bytes(lengths, 8, 2)


@pytest.mark.parametrize("kind", ["store", "bpe_store"])
def test_every_document_comes_back_exactly_with_its_provenance(kind: str, request: pytest.FixtureRequest) -> None:
    store: TokenStore = request.getfixturevalue(kind)
    given = {f"doc-{i}": (text, "even" if i % 2 == 0 else "odd") for i, text in enumerate(texts(200))}
    seen = set()
    for name in ("train", "validation"):
        split = store.split(name)
        for i in range(split.n_documents):
            row = split.provenance(i)
            text, source = given[row["id"]]
            assert split.text_of(i) == text
            assert split.source_of(i) == row["source"] == source
            assert split.document_bytes[i] == row["bytes"] == len(text.encode())
            assert row["hash"] == content_hash(text.encode()).hex()
            assert row["tokens"] == len(split.document(i))
            assert row["url"] == f"https://x.test/{row['id'][4:]}"
            assert split.document(i)[-1] == store.eod
            assert int((split.document(i) == store.eod).sum()) == 1
            seen.add(row["id"])
        assert split.document_bytes.sum() == store.manifest.splits[name].bytes
    assert seen == given.keys()


def test_the_documents_one_after_the_other_are_the_stream(store: TokenStore) -> None:
    split = store.split("train")
    assert np.array_equal(np.concatenate([split.document(i) for i in range(split.n_documents)]), split.tokens)


@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_a_window_leads_back_to_the_documents_it_was_cut_from(store: TokenStore, seq_len: int) -> None:
    split = store.split("train")
    for window in range(0, split.n_tokens // seq_len + 1, 97 // seq_len + 1):
        spans = split.trace_window(window, seq_len)
        cut = [split.document(span["document"])[span["first"] : span["last"]] for span in spans]
        assert np.array_equal(
            np.concatenate(cut) if cut else [], split.tokens[window * seq_len : (window + 1) * seq_len]
        )
        assert all(span["provenance"] == split.provenance(span["document"]) for span in spans)


def test_provenance_is_found_in_every_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "SIDECAR_GROUP", 16)
    monkeypatch.setattr(split_writer, "SIDECAR_GROUP", 16)
    rows = [{"text": f"text number {i}", "id": str(i)} for i in range(100)]
    section = data_section(source="jsonl", paths=[str(write_jsonl(tmp_path / "a.jsonl", rows))])
    prepare(section, 256, tmp_path / "store")
    split = TokenStore.open(tmp_path / "store").split("train")
    assert pq.ParquetFile(tmp_path / "store" / "train.parquet").num_row_groups > 4
    for i in range(split.n_documents):
        assert split.text_of(i) == f"text number {split.provenance(i)['id']}"


@pytest.mark.parametrize("ask", [lambda s: s.document(10**6), lambda s: s.text_of(-1), lambda s: s.provenance(10**6)])
def test_a_missing_document_is_refused(store: TokenStore, ask: Any) -> None:
    split: Split = store.split("train")
    with pytest.raises(UserError, match=f"0 to {split.n_documents - 1}"):
        ask(split)


def test_a_missing_split_is_refused(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"'test'.*train, validation"):
        store.split("test")
