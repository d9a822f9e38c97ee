"""A measured training step as a row: of plan/measured.csv, and of a table for people."""

import csv
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from minka.plan.config import RunConfig
from minka.plan.flops import FORMULAS, parameters, training_flops_per_token
from minka.plan.hardware import find_gpu
from minka.train.dry_run import dry_run

Row = dict[str, Any]

SHAPE = ("layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "vocab", "tied", "qk_norm")
HEAD = ("case", "layers", "ms a step", "tokens/s", "MFU", "MFU (PaLM)", "allocated", "reserved", "predicted", "peer")


def name_of(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def described(case: str, config: RunConfig, device: torch.device) -> Row:
    """What was measured: device, sizes and settings, and the peak that a dry run predicts, bytes."""
    model, layout, stored = config.model, config.layout, config.optimizer
    return {
        "date": str(date.today()),
        "device": name_of(device),
        "torch": torch.__version__,
        "case": case,
        **{name: getattr(model, name) for name in SHAPE},
        "parameters": parameters(model),
        "seq_len": config.data.seq_len,
        "micro_batch": layout.micro_batch,
        "batch_tokens": config.data.batch_tokens,
        "precision": layout.precision,
        "weights": stored.weights,
        "moments": stored.moments,
        "recompute": layout.recompute,
        "compile": config.kernels.compile,
        "predicted_peak_bytes": dry_run(config, 1, 0, as_gpu=device.type == "cuda").memory.total,
    }


def rates(config: RunConfig, device: torch.device, seconds: float, tokens: int) -> Row:
    """Seconds of a step, tokens a second, and MFU by each convention; None for a GPU whose peak is not known."""
    gpu, rate = find_gpu(name_of(device)), tokens / seconds
    flops = {name: training_flops_per_token(config.model, config.data.seq_len, name) for name in FORMULAS}
    mfu = {f"mfu_{name}": rate * flops[name] / gpu.peak_flops if gpu else None for name in FORMULAS}
    return {"step_seconds": seconds, "tokens_per_second": rate, **mfu}


def memory(device: torch.device) -> dict[str, int]:
    """The peaks that the device's allocator has counted, bytes; 0 on a CPU."""
    if device.type != "cuda":
        return {"allocated_bytes": 0, "reserved_bytes": 0}
    statistics = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(("allocated_bytes", "reserved_bytes"), statistics, strict=True))


def append(file: Path, rows: Sequence[Row]) -> None:
    """Add rows to a CSV file; columns that it does not have yet are added at the end, and are empty in older rows."""
    older, names = list[Row](), list[str]()
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            older, names = list(reader), list(reader.fieldnames or ())
    columns = list(dict.fromkeys((*names, *(key for row in rows for key in row))))
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*older, *rows])


def shown(row: Row) -> tuple[str, ...]:
    """A row as texts for a table."""
    mfu = ["-" if row[f"mfu_{name}"] is None else f"{row[f'mfu_{name}']:.1%}" for name in ("causal", "palm")]
    gib = [f"{row[key] / 2**30:.2f} GiB" for key in ("allocated_bytes", "reserved_bytes", "predicted_peak_bytes")]
    speed = f"{1e3 * row['step_seconds']:.4g}", f"{row['tokens_per_second']:,.0f}"
    return row["case"], str(row["layers"]), *speed, *mfu, *gib, row.get("peer", "")
