"""Tokenizers: exact round trips, an end-of-document token that text cannot make, folders that transformers loads."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from corpora import data_section, run_config, texts, write_jsonl
from minka.data.prepare import check_store, prepare
from minka.data.token_store import TokenStore
from minka.data.tokenizer import EOD_TOKEN, TextTokenizer, bytes_tokenizer, load_hf, read_tokenizer, train_bpe
from minka.plan.errors import UserError

TRAINED = train_bpe([text.encode() for text in texts(100)], 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(), TRAINED], ids=["bytes", "bpe"])
@given(text=ANY_TEXT)
def test_any_text_comes_back_exactly_and_holds_no_end_of_document(tokenizer: TextTokenizer, text: str) -> None:
    for trap in (text, f"{text}{EOD_TOKEN}{text}", f"\r\n{text}ÿ\x00"):
        (tokens,) = tokenizer.encode([trap])
        assert tokenizer.decode(tokens) == trap
        assert tokenizer.decode([*tokens.tolist(), tokenizer.eod]) == trap
        assert tokenizer.eod not in tokens
        assert tokens.max(initial=0) < tokenizer.entries


def test_a_token_of_the_bytes_tokenizer_is_a_byte() -> None:
    (tokens,) = bytes_tokenizer().encode(["héllo"])
    assert tokens.tolist() == list("héllo".encode())
    assert bytes_tokenizer().eod == 0xFF


@pytest.mark.parametrize("kind", ["store", "bpe_store"])
def test_transformers_loads_the_folder_and_agrees(kind: str, request: pytest.FixtureRequest) -> None:
    store: TokenStore = request.getfixturevalue(kind)
    theirs = AutoTokenizer.from_pretrained(store.tokenizer_folder)
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (EOD_TOKEN, store.eod, store.manifest.vocab)
    plain = [text for text in texts(50, seed=3) if EOD_TOKEN not in text]
    for text, ours in zip(plain, store.tokenizer.encode(plain), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.tolist()
        assert theirs.decode(ours.tolist()) == text


def test_a_saved_tokenizer_is_read_back_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer")
    again = read_tokenizer(tmp_path / "tokenizer", "bpe", TRAINED.eod, TRAINED.entries)
    for text, tokens in zip(texts(20), TRAINED.encode(texts(20)), strict=True):
        assert np.array_equal(again.encode([text])[0], tokens)


def test_training_is_deterministic_and_fills_the_vocabulary_exactly() -> None:
    again = train_bpe([text.encode() for text in texts(100)], 300)
    assert again.backend.to_str() == TRAINED.backend.to_str()
    assert TRAINED.backend.get_vocab_size() == TRAINED.entries == 300


def test_a_long_unbroken_word_is_trained_on_in_pieces_and_encoded_whole() -> None:
    """The trainer's time grows with the square of a word's length: 0.25 MB of one letter took a minute."""
    for letter in (b"a", b" "):
        with pytest.raises(UserError, match="fills 269 entries"):  # 257, and 12 that double up to 4,096
            train_bpe([letter * 40_960], 300)
        text = letter.decode() * 40_960
        trained = train_bpe([letter * 40_960], 269)
        (tokens,) = trained.encode([text])
        assert trained.decode(tokens) == text


def test_ordinary_text_gives_the_tokenizer_it_always_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = [text.encode() for text in texts(100)] + [Path(json.__file__).read_bytes(), b"=" * 4_096]
    bounded = train_bpe(ordinary, 600).backend.to_str()
    monkeypatch.setattr("minka.data.tokenizer.LONGEST_WORD", 100_000)
    assert train_bpe(ordinary, 600).backend.to_str() == bounded
    assert json.loads(bounded)["pre_tokenizer"]["type"] == "ByteLevel"


def test_a_vocabulary_that_the_text_cannot_fill_names_one_that_it_can() -> None:
    with pytest.raises(UserError) as caught:
        train_bpe([b"abababab cdcd"], 5_000)
    fits = int(caught.value.what.split()[3])
    assert f"model.vocab={fits}" in caught.value.remedy
    assert train_bpe([b"abababab cdcd"], fits).entries == fits


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="257"):
        prepare(data_section(tokenizer="bpe"), 256, tmp_path / "store")


def test_a_hugging_face_folder_tokenizes_a_store(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "mine")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    fields = {"source": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "tokenizer": str(tmp_path / "mine")}
    prepare(data_section(**fields), 512, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    assert (store.manifest.tokenizer.kind, store.manifest.vocab, store.eod) == ("hf", 300, TRAINED.eod)
    assert store.manifest.exact
    split = store.split("train")
    (tokens,) = TRAINED.encode([split.text_of(0)])
    assert split.document(0).tolist() == [*tokens.tolist(), TRAINED.eod]
    config = run_config(
        data=data_section(**fields).model_dump(), model=run_config().model.model_dump() | {"vocab": 512}
    )
    check_store(store, config)  # an embedding may have more rows than the tokenizer has entries
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"vocab": 299})})
    with pytest.raises(UserError, match=r"300 entries.* 299 rows"):
        check_store(store, narrow)
    saved = (store.tokenizer_folder / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in saved


def test_a_hugging_face_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "mine")
    with pytest.raises(UserError, match=r"299.* 256 rows.*model.vocab to 300"):
        load_hf(str(tmp_path / "mine"), 256)


def test_a_hugging_face_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "mine")
    (tmp_path / "mine" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="eos_token") as caught:
        load_hf(str(tmp_path / "mine"), 512)
    assert caught.value.where == f"data.tokenizer={tmp_path / 'mine'}"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_tokenizer_whose_end_is_made_from_text_is_refused(tmp_path: Path) -> None:
    """A letter as end of text would cut documents in two, and masks and byte counts would be silently wrong."""
    TRAINED.save(tmp_path / "mine")
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "e"}'
    (tmp_path / "mine" / "tokenizer_config.json").write_text(config)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "e"}])
    section = data_section(source="jsonl", paths=[str(tmp_path / "a.jsonl")], tokenizer=str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"end-of-document token \(id"):
        prepare(section, 512, tmp_path / "store")
    gc.collect()  # half-written files must not complain on stderr when they are collected


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_hf(str(tmp_path), 512)
    assert caught.value.where == f"data.tokenizer={tmp_path}"
