"""Tokenizers: plain bytes, a byte-level BPE trained on the training split, or one from Hugging Face, as a folder."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minka.plan.errors import UserError

EOD_TOKEN = "<|endoftext|>"
BYTES_EOD = 0xFF  # a byte that no UTF-8 text contains
# Settings of a loaded tokenizer that are kept; the rest is its own class's, and paths of the machine it was loaded on.
HF_SETTINGS = ("clean_up_tokenization_spaces", "model_max_length", "padding_side", "chat_template")
BPE_LEAST = 257  # one entry a byte, and the end of a document
Kind = Literal["bytes", "bpe", "hf"]


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back. `eod` ends every document in a store and is never made from text; ids < entries."""

    kind: Kind
    backend: Tokenizer
    eod: int
    entries: int
    files: dict[str, str]  # further files of the folder, by name

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Token ids of each text, without eod: one array each, of some unsigned or signed integer type."""
        if self.kind == "bytes":
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """The text of token ids (a closing eod is left out). Exact for bytes and byte-level BPE on whole documents;
        elsewhere what is no UTF-8 becomes U+FFFD."""
        ids = np.asarray(tokens)
        if ids.size and ids[-1] == self.eod:
            ids = ids[:-1]
        if self.kind == "bytes":
            return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        return str(self.backend.decode(ids.tolist(), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write a folder that transformers.AutoTokenizer loads."""
        folder.mkdir(parents=True)
        for name, text in {**self.files, "tokenizer.json": self.backend.to_str(pretty=True)}.items():
            (folder / name).write_text(text, encoding="utf-8")


def read_tokenizer(folder: Path, kind: Kind, eod: int, entries: int) -> TextTokenizer:
    """The tokenizer in a store's folder. Raises UserError when it is damaged."""
    file = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"this tokenizer cannot be read: {error}", where=str(file)) from None
    return TextTokenizer(kind, _plain(backend), eod, entries, {})


def tokenizer_hash(folder: Path) -> str:
    """sha256 of the folder's tokenizer.json."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def bytes_tokenizer() -> TextTokenizer:
    """Id = byte. As a Hugging Face folder: a byte-level BPE without merges, with entry 255 as the end of a document."""
    vocab = {letter: byte for byte, letter in enumerate(_letters())}
    del vocab[_letters()[BYTES_EOD]]
    vocab[EOD_TOKEN] = BYTES_EOD
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    _byte_level(backend)
    backend.add_special_tokens([EOD_TOKEN])
    return TextTokenizer("bytes", _plain(backend), BYTES_EOD, 256, _config())


def train_bpe(texts: Sequence[bytes], vocab: int, train_bytes: int) -> TextTokenizer:
    """A byte-level BPE with exactly `vocab` entries from UTF-8 texts (GPT-2's way to cut words; Radford et al. 2019).

    train_bytes: size of the whole training split, for the message. Raises UserError when the texts cannot fill `vocab`.
    """
    check_bpe_vocab(vocab)
    backend = Tokenizer(models.BPE())
    _byte_level(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(_letters()), special_tokens=[EOD_TOKEN], show_progress=False
    )
    backend.train_from_iterator(_decoded(texts), trainer)
    entries = backend.get_vocab_size()
    if entries < vocab:
        raise UserError(
            f"the text fills {entries} entries of a vocabulary of {vocab}",
            where=f"model.vocab={vocab}",
            why=f"in {train_bytes:,} bytes of training text no further pair of tokens occurs twice",
            remedy=f'set model.vocab={entries} or less (at least {BPE_LEAST}), use data.tokenizer="bytes" with '
            "model.vocab=256, or give more text",
        )
    eod = backend.token_to_id(EOD_TOKEN)
    assert eod is not None  # the trainer puts its special tokens first
    return TextTokenizer("bpe", _plain(backend), eod, entries, _config())


def check_bpe_vocab(vocab: int) -> None:
    """Refuse a vocabulary without room for the bytes and the end of a document. Raises UserError."""
    if vocab < BPE_LEAST:
        raise UserError(
            f"a trained vocabulary has at least {BPE_LEAST} entries: one a byte, and the end of a document",
            where=f"model.vocab={vocab}",
            remedy=f'set model.vocab to {BPE_LEAST} or more, or data.tokenizer="bytes"',
        )


def load_hf(name: str, vocab: int) -> TextTokenizer:
    """A tokenizer from a Hugging Face folder or name.

    Raises UserError when it has no end-of-text token, no fast version, or more entries than `vocab`.
    """
    from transformers import AutoTokenizer  # seconds to import, and only this kind needs it

    where = f"data.tokenizer={name}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, and what the hub and the parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"this tokenizer cannot be loaded: {reason}",
            where=where,
            remedy='give a folder with a tokenizer.json, a name on the hub, "bpe" (trained on the corpus) or "bytes"',
        ) from None
    if not tokenizer.is_fast:
        raise UserError("this tokenizer has no fast version (tokenizer.json)", where=where)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "this tokenizer names no end-of-text token",
            where=where,
            why="every document must end with one",
            remedy='set "eos_token" in its tokenizer_config.json',
        )
    entries = max(tokenizer.get_vocab().values()) + 1
    if entries > vocab:
        raise UserError(
            f"its token ids reach {entries - 1}, beyond the {vocab} rows of the model's embedding",
            where=where,
            remedy=f"set model.vocab to {entries} or more (a multiple of 64 is fast: {-(-entries // 64) * 64})",
        )
    kept = {key: tokenizer.init_kwargs[key] for key in HF_SETTINGS if key in tokenizer.init_kwargs}
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **kept, **special}
    files = {"tokenizer_config.json": json.dumps(config, indent=2)}
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return TextTokenizer("hf", _plain(backend), int(tokenizer.eos_token_id), entries, files)


def _plain(backend: Tokenizer) -> Tokenizer:
    backend.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not the end of it
    backend.no_padding()
    backend.no_truncation()
    return backend


def _byte_level(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _decoded(texts: Sequence[bytes]) -> Iterator[str]:
    for raw in texts:
        yield raw.decode("utf-8")


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _config() -> dict[str, str]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {"tokenizer_config.json": json.dumps(config, indent=2)}
