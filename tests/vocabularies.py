"""Tokenizers as people bring them, each a folder that transformers loads, trained on a few words of ASCII."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = ["the loss of a run is one number and the data are many so look at both before you change it", "w x y z"] * 3
EXACT = ("gpt2", "roberta", "llama3", "llama2", "bytes_prefix")  # lose no byte of any text
LOSSY = ("gaps", "lower", "nfkc", "accents", "unknown", "wordpiece")


def save_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Write the tokenizer `kind` into `folder`, and return it."""
    folder.mkdir(parents=True)
    backend = _MAKERS[kind]()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


def _bpe(normalizer: Any = None, processor: Any = None, **pre: bool) -> Tokenizer:
    """Byte-level, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | pre)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    if processor:
        backend.post_processor = processor
    return backend


def _template() -> Any:
    return processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def _llama2() -> Tokenizer:
    """As converted from SentencePiece: a prefixed space, bytes for what the vocabulary lacks, a BOS."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, *every_byte], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = _template()
    return backend


def _gaps() -> Tokenizer:
    """Metaspace and a vocabulary without bytes or an unknown token: what it lacks disappears."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False))
    backend.post_processor = _template()
    return backend


def _words(**model: str) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(**model))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return backend


def _wordpiece() -> Tokenizer:
    """As BERT's, which folds letter case and accents, and adds two tokens."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL))
    backend.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return backend


_MAKERS = {
    "gpt2": lambda: _bpe(processor=processors.ByteLevel(trim_offsets=True)),
    "roberta": lambda: _bpe(processor=processors.RobertaProcessing(("</s>", 2), ("<s>", 1))),
    "llama3": lambda: _bpe(processor=processors.Sequence([processors.ByteLevel(), _template()])),
    "bytes_prefix": lambda: _bpe(add_prefix_space=True),
    "llama2": _llama2,
    "gaps": _gaps,
    "lower": lambda: _bpe(normalizers.Lowercase()),
    "nfkc": lambda: _bpe(normalizers.NFKC()),
    "accents": lambda: _bpe(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "unknown": lambda: _words(unk_token="<unk>"),
    "refuses": lambda: _words(unk_token="[UNK]"),  # which is not in its vocabulary
    "wordpiece": _wordpiece,
}
