"""A Hugging Face tokenizer's files, made to encode text as it is encoded for training: without additions."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.read_file import MALFORMED, read_json, reading

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


class AsTrained(NamedTuple):
    """What tokenizer.json has to be, and the settings in tokenizer_config.json that must go with it."""

    tokenizer: dict[str, Any]
    settings: dict[str, object]
    added: tuple[str, ...]  # tokens that it added to each text


def as_trained(tokenizer: Mapping[str, Any]) -> AsTrained:
    """A tokenizer.json whose post-processor adds no token: documents are encoded without, and end with eod.

    A BOS that training has never seen makes every prediction after it worse. The rest, which decides ids, is kept.
    """
    kept, added = _without_additions(tokenizer.get("post_processor"))
    settings: dict[str, object] = {"add_bos_token": False, "add_eos_token": False} if added else {}
    pre = tokenizer.get("pre_tokenizer") or {}
    if pre.get("type") == "ByteLevel" and pre.get("add_prefix_space"):
        settings["add_prefix_space"] = True  # transformers 4 would set it to false, which changes ids
    return AsTrained({**tokenizer, "post_processor": kept}, settings, added)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's two files between folders, as trained; unchanged when they are. Raises UserError."""
    remedy = f"put the token store's {TOKENIZER} back"
    with reading(source / TOKENIZER, "a tokenizer", *MALFORMED, remedy=remedy):
        found = as_trained(read_json(source / TOKENIZER, remedy=remedy))
    settings = read_json(source / SETTINGS, remedy=f"put the token store's {SETTINGS} back")
    if found.added:
        (target / TOKENIZER).write_text(json.dumps(found.tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    if found.settings.items() <= settings.items():
        shutil.copyfile(source / SETTINGS, target / SETTINGS)
    else:
        (target / SETTINGS).write_text(json.dumps({**settings, **found.settings}, indent=2), encoding="utf-8")


def _without_additions(processor: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What remains of a post-processor (null, or a step that only changes offsets), and the tokens that it added."""
    if processor is None:
        return None, ()
    kind = processor["type"]
    if kind == "Sequence":
        parts = [_without_additions(part) for part in processor["processors"]]
        kept = [part for part, _ in parts if part is not None]
        return ({**processor, "processors": kept} if kept else None), tuple(t for _, added in parts for t in added)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return None, (processor["cls"][0], processor["sep"][0])
    added = [part["SpecialToken"]["id"] for part in processor.get("single", ()) if "SpecialToken" in part]
    return (None if added else dict(processor)), tuple(added)
