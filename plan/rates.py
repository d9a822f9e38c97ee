"""What share of a cluster's rates a step reaches: tabulated with sources, or fitted to measured runs (calibrate.py)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minka.plan.errors import UserError
from minka.plan.read_file import read_toml

# Shares of the peak that attention's forward and backward reach together, by kernel.
ATTENTION_SHARE = {
    "fa1": 0.175,  # half of FlashAttention-2's (arXiv:2307.08691, abstract: "around 2x")
    "fa2": 0.35,  # of an H100 (arXiv:2407.08608, abstract)
    "fa3": 0.55,  # cuDNN's too: 740 TFLOP/s forward in fp16, less in backward (arXiv:2407.08608, figure 5)
}


@dataclass(frozen=True)
class Rates:
    """Each share is of a rate on the data sheet. `calibrated_on` is empty for tabulated ones."""

    matrix: float = 0.72  # large bf16 products on an H100 (NVIDIA's cuBLAS: 680 to 750 of 989 TFLOP/s)
    attention: float = ATTENTION_SHARE["fa2"]
    memory: float = 0.7  # of kernels that only move bytes, those of an optimizer too
    link: float = 0.75  # bus bandwidth of NCCL between the GPUs of a host: 330 to 360 of 450 GB/s
    network: float = 0.8
    exposed: float = 0.3  # of collectives that could hide behind compute: they share multiprocessors and memory
    layer_seconds: float = 0.0005  # launching a block's kernels, forward and backward, which a queue mostly hides
    message_seconds: float = 0.00002  # of a collective or a message, whatever its size
    calibrated_on: str = ""

    def described(self) -> str:
        """Return "calibrated on ..." or "not calibrated"."""
        return f"calibrated on {self.calibrated_on}" if self.calibrated_on else "not calibrated"


TABULATED = Rates()
FITTED = tuple(field.name for field in fields(Rates) if field.name != "calibrated_on")
SHARES = ("matrix", "attention", "memory", "link", "network", "exposed")


def read_rates(path: Path) -> Rates:
    """Return what `minka plan calibrate` wrote. Raises UserError."""
    values = read_toml(path, remedy="give a file that `minka plan calibrate` wrote")
    if "rates" in values and len(values) > 1:
        what, remedy = "describes a machine, not rates", f"give it as --gpu {path}"
        raise UserError(what, where=str(path), remedy=remedy)
    return rates_of(values.get("rates", values), str(path))


def rates_of(values: Mapping[str, Any], where: str) -> Rates:
    """Return the rates of a table; those it lacks are tabulated ones. Raises UserError."""
    if not isinstance(values, Mapping):
        raise UserError("[rates] is not a table", where=where, remedy=f"give some of {', '.join(FITTED)}")
    for key, value in values.items():
        if key not in (*FITTED, "calibrated_on"):
            raise UserError(f"unknown key {key!r}", where=where, remedy=f"known: {', '.join(FITTED)}, calibrated_on")
        if key == "calibrated_on":
            if not isinstance(value, str):
                raise UserError(f"calibrated_on={value!r} is not a text", where=where, remedy="name the runs")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key not in ("exposed", "layer_seconds", "message_seconds")):
            raise UserError(f"{key}={value!r} is not a number above 0", where=where, remedy="measure it again")
        if key in SHARES and value > 1:
            what, remedy = f"{key}={value!r} is more than all of the data sheet's rate", "give a share of 1 or less"
            raise UserError(what, where=where, remedy=remedy)
    return replace(TABULATED, **values)


def rates_toml(rates: Rates) -> str:
    """Return the file that read_rates reads, or the end of a cluster's."""
    lines = ["# Shares of the rates of a data sheet that steps reach, and seconds of what has no bytes.", "[rates]"]
    for key, value in asdict(rates).items():
        lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value:.6g}")
    return "\n".join(lines) + "\n"
