"""Small corpora, and configurations that read them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import values
from minka.plan.config import RunConfig
from minka.plan.config_sections import DataSection

WORDS = "the of model token naïve データ while return def \n \t, . 0 1 42 ÿ <|endoftext|> \r\n".split(" ")


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` different documents of 1 to 60 words, in several scripts and with traps in them."""
    source = random.Random(seed)
    return [f"{i} " + " ".join(source.choices(WORDS, k=source.randint(1, 60))) for i in range(count)]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def data_section(**fields: Any) -> DataSection:
    """A DataSection of plain bytes, unless `fields` say otherwise."""
    return DataSection.model_validate({"tokenizer": "bytes", "seq_len": 16, "batch_tokens": 64} | fields)


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """The smallest run, with `sections` replaced."""
    return RunConfig.model_validate(values(**sections))
