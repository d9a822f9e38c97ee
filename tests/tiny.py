"""A run small enough to repeat under every layout: bytes, uneven documents, accumulation, batch warm-up, padding."""

import random
from collections.abc import Mapping
from pathlib import Path

from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.load_config import validate
from minka.plan.resume_rules import LENGTH
from minka.train.worker import work

WORDS = "the loss of a run is one number and the data are many so look at both before you change the model".split()


def corpus(folder: Path, documents: int = 60, seed: int = 1) -> Path:
    """A folder of text files of 1 to 400 bytes: some shorter than a sequence, some many times as long."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    for number in range(documents):
        text = " ".join(dice.choice(WORDS) for _ in range(dice.choice([1, 2, 5, 20, 80])))
        (folder / f"{number:03d}.txt").write_text(f"{number} {text}\n")
    return folder


def tiny(folder: Path, **sections: Mapping[str, object]) -> RunConfig:
    """A run under `folder` on `corpus(folder / "corpus")`. Keyword arguments override sections: run={"seed": 3}."""
    if not (folder / "corpus").exists():
        corpus(folder / "corpus")
    values: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "seed": 7, "max_steps": 20, "folder": str(folder / "runs")},
        "model": {
            "layers": 2,
            "d_model": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "d_ff": 72,
            "vocab": 256,
            "z_loss": 1e-4,
        },
        "data": {
            "source": "text",
            "paths": [str(folder / "corpus")],
            "tokenizer": "bytes",
            "store": str(folder / "store"),
            "validation_fraction": 0.1,
            "seq_len": 32,
            "batch_tokens": 13 * 32,  # on two ranks by two: three micro-batches, three padding sequences
            "batch_warmup": [{"until_tokens": 40 * 32, "batch_tokens": 5 * 32}],
        },
        "optimizer": {"learning_rate": 3e-3, "max_norm": 0.5},
        "schedule": {"kind": "cosine", "warmup": 4},
        "layout": {"micro_batch": 2},
        "checkpoint": {"export": False},
        "tracking": {"log_every": 5, "record_samples": True},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return validate(values, "tests/tiny.py")


def train_rank(config: RunConfig, *given: str) -> int:
    """One rank of the run, by the real worker; for on_ranks. `given`: keys that the user gave, besides the length."""
    return work(Job(config=config, threads=1, given=(*LENGTH, *given)))
