"""Tokenizers: plain bytes, a byte-level BPE trained on the training split, or one loaded from Hugging Face."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minka.plan.errors import UserError
from minka.plan.hub_tokenizer import SETTINGS, TOKENIZER, as_trained
from minka.plan.read_file import first_line, reading

EOD_TOKEN = "<|endoftext|>"
BYTES_EOD = 0xFF  # a byte that no UTF-8 text contains
# Settings of a loaded tokenizer that are kept. The others belong to its class, or are paths on this machine.
HF_SETTINGS = ("clean_up_tokenization_spaces", "model_max_length", "padding_side", "chat_template")
OWN_SETTINGS: Mapping[str, object] = {
    "eos_token": EOD_TOKEN,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,
}
LONGEST_WORD = 4_096  # bytes that the trainer sees as one word: its time grows with the square of the longest
BPE_MIN_ENTRIES = 257  # one entry for each byte, and the end of a document
TokenizerKind = Literal["bytes", "bpe", "hf"]


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids (< entries) and back. `eod` ends every document in a store and is never made from text."""

    kind: TokenizerKind
    backend: Tokenizer
    eod: int
    entries: int
    settings: Mapping[str, object]  # of tokenizer_config.json
    added: tuple[str, ...] = ()  # tokens that it added to each text where it was loaded from, and does not add here

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Token ids of each text, without eod: one array each, of any integer dtype."""
        if self.kind == "bytes":
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode_known(self, tokens: NDArray[Any]) -> str:
        """As decode, without the tokens that stand for unknown text."""
        return self.decode(tokens if self._unknown is None else tokens[tokens != self._unknown])

    @cached_property
    def _unknown(self) -> int | None:
        model = json.loads(self.backend.to_str())["model"]
        token = model.get("unk_token")
        found: int | None = model.get("unk_id") if token is None else self.backend.token_to_id(token)
        return found

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """The text of token ids, without a final eod. Exact for bytes and byte-level BPE on whole documents;
        otherwise bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(tokens)
        if ids.size and ids[-1] == self.eod:
            ids = ids[:-1]
        if self.kind == "bytes":
            return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return str(self.backend.decode(ids.tolist(), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write a folder that transformers.AutoTokenizer loads."""
        folder.mkdir(parents=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        (folder / SETTINGS).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / TOKENIZER).write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def read_tokenizer(folder: Path, kind: TokenizerKind, eod: int, entries: int) -> TextTokenizer:
    """Read the tokenizer of a store. Raises UserError when it is damaged."""
    file = folder / TOKENIZER
    with reading(file, "a tokenizer", Exception):  # the Rust code raises plain Exception
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    return TextTokenizer(kind, _plain(backend), eod, entries, {})


def bytes_tokenizer() -> TextTokenizer:
    """Id = byte. In a Hugging Face folder: a byte-level BPE without merges, in which entry 255 ends a document."""
    letters = [*_letters()[:BYTES_EOD], EOD_TOKEN]
    backend = _byte_level(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    backend.add_special_tokens([EOD_TOKEN])
    return TextTokenizer("bytes", _plain(backend), BYTES_EOD, 256, OWN_SETTINGS)


def train_bpe(texts: Sequence[bytes], vocab: int) -> TextTokenizer:
    """A byte-level BPE with exactly `vocab` entries from UTF-8 texts; splits words as GPT-2 does (Radford et al. 2019).

    `vocab` is at least BPE_MIN_ENTRIES. Raises UserError when the texts cannot fill it.
    """
    backend = _byte_level(models.BPE())
    words = backend.pre_tokenizer
    if any(map(_has_long_word, texts)):
        pieces = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(_letters()), special_tokens=[EOD_TOKEN], show_progress=False
    )
    backend.train_from_iterator((raw.decode("utf-8") for raw in texts), trainer)
    backend.pre_tokenizer = words  # a text is encoded whole: that takes no square of its length
    entries = backend.get_vocab_size()
    if entries < vocab:
        raise UserError(
            f"the text fills {entries} entries of a vocabulary of {vocab}",
            where=f"model.vocab={vocab}",
            why=f"in {sum(map(len, texts)):,} bytes of training text no further pair of tokens occurs twice",
            remedy=f'set model.vocab={entries} or less (at least {BPE_MIN_ENTRIES}), use data.tokenizer="bytes" with '
            "model.vocab=256, or give more text",
        )
    eod = backend.token_to_id(EOD_TOKEN)
    assert eod is not None  # the trainer puts its special tokens first
    return TextTokenizer("bpe", _plain(backend), eod, entries, OWN_SETTINGS)


def load_hf(name: str, vocab: int) -> TextTokenizer:
    """Load a tokenizer from a Hugging Face folder or name.

    Raises UserError when it has no end-of-text token, no fast version, or more entries than `vocab`.
    """
    from transformers import AutoTokenizer  # takes seconds to import, and only this kind needs it

    where = f"data.tokenizer={name}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # else it asks
    except Exception as error:  # the hub and the parsers raise errors without a common base
        remedy = 'give a folder with a tokenizer.json, a name on the hub, "bpe" (trained on the corpus) or "bytes"'
        raise UserError(f"this tokenizer cannot be loaded: {first_line(error)}", where=where, remedy=remedy) from None
    if not tokenizer.is_fast:
        raise UserError("this tokenizer has no fast version (tokenizer.json)", where=where)
    if tokenizer.eos_token_id is None:
        what = "this tokenizer names no end-of-text token, and every document must end with one"
        raise UserError(what, where=where, remedy='set "eos_token" in its tokenizer_config.json')
    entries = max(tokenizer.get_vocab().values()) + 1
    if entries > vocab:
        what = f"its token ids reach {entries - 1}, beyond the {vocab} rows of the model's embedding"
        remedy = f"set model.vocab to {entries} or more (a multiple of 64 is fast: {-(-entries // 64) * 64})"
        raise UserError(what, where=where, remedy=remedy)
    kept = {key: tokenizer.init_kwargs[key] for key in HF_SETTINGS if key in tokenizer.init_kwargs}
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    found = as_trained(json.loads(tokenizer.backend_tokenizer.to_str()))
    backend = _plain(Tokenizer.from_str(json.dumps(found.tokenizer)))
    settings = kept | special | found.settings
    return TextTokenizer("hf", backend, int(tokenizer.eos_token_id), entries, settings, found.added)


def _plain(backend: Tokenizer) -> Tokenizer:
    backend.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not its end
    backend.no_padding()
    backend.no_truncation()
    return backend


def _has_long_word(text: bytes) -> bool:
    spaces = re.search(rb"\s{%d}" % LONGEST_WORD, text)
    return spaces is not None or max(map(len, text.split()), default=0) > LONGEST_WORD


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters() -> list[str]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
