"""The file of a law of the loss: what `minka plan fit` writes and `--law FILE.toml` reads."""

import math
from pathlib import Path
from typing import Any

import tomli_w

from minka.plan.atomic import write_text, writing
from minka.plan.errors import UserError
from minka.plan.loss_laws import LossLaw, find_law
from minka.plan.read_file import read_toml

NAMES = ("A", "B", "E", "alpha", "beta")
REMEDY = "give a file that `minka plan fit RUNS -o FILE.toml` wrote"


def law_of_name(name: str) -> LossLaw:
    """Return a published law, or that of a file. Raises UserError."""
    return read_law(Path(name)) if name.endswith(".toml") else find_law(name)


def write_law(path: Path, law: LossLaw) -> None:
    """Write the file that `--law FILE.toml` reads. Raises UserError."""
    values: dict[str, Any] = {name: getattr(law, name) for name in (*NAMES, "spread", "source")}
    values["bootstrap"] = [list(row) for row in law.bootstrap]
    with writing(path, "choose a different file (-o)"):
        write_text(path, "# A law of the loss: E + A / N^alpha + B / D^beta, nats a token.\n" + tomli_w.dumps(values))


def read_law(path: Path) -> LossLaw:
    """Return what `write_law` wrote. Raises UserError."""
    values = read_toml(path, remedy=REMEDY)
    numbers = [values.get(name) for name in (*NAMES, "spread")]
    fine = all(isinstance(one, float | int) and 0 < one < math.inf for one in numbers)
    rows = values.get("bootstrap", [])
    if not fine or not isinstance(rows, list) or any(not _is_numbers(row) for row in rows):
        raise UserError("not a law of the loss", where=str(path), remedy=REMEDY)
    *law, spread = (float(one) for one in numbers if one is not None)
    source = str(values.get("source", path))
    return LossLaw.of(path.stem, law, source=source, spread=spread, refits=rows)


def _is_numbers(row: Any) -> bool:
    return isinstance(row, list) and len(row) == len(NAMES) and all(isinstance(one, float | int) for one in row)
