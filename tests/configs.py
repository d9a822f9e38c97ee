"""Configurations that tests start from."""

from typing import Any

SEQ = 8  # tokens in a sequence of the run below


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    """Values of the smallest run, as TOML would give them, updated with `sections`."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "max_steps": 10},
        "model": {"layers": 1, "d_model": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "d_ff": 16, "vocab": 256},
        "data": {"tokenizer": "bytes", "seq_len": SEQ, "batch_tokens": 4 * SEQ},
        "optimizer": {"learning_rate": 1e-3},
    }
    return {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}
