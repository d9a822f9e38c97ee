"""The runs that a law is fitted to: rows of a CSV file, or run folders that were scored at their end."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minka.plan.errors import UserError
from minka.plan.fit_law import Runs
from minka.plan.ledger import number, read_ledger
from minka.plan.read_file import read_json, reading
from minka.plan.run_folder import RunFolder, find_run

LEAST = 6  # rows: the law has five numbers
COLUMNS = "params, tokens or flops (6 N D), and loss (nats a token)"
ALSO = {"parameters": "params", "n": "params", "d": "tokens", "c": "flops", "l": "loss"}
HIGHEST = 20.0  # nats a token: more than guessing among any vocabulary
SCORES = "evals/step-*/heldout@1.json"
WHERE = "minka plan fit"


def read_runs(given: Sequence[str]) -> tuple[Runs, list[str]]:
    """Return the runs and their names. Raises UserError for what cannot be fitted."""
    tables = [Path(one) for one in given if one.endswith(".csv")]
    if tables and len(given) > 1:
        raise UserError("one CSV file, or run folders", where=WHERE, remedy="put all rows into one file")
    rows = _rows(tables[0]) if tables else [_of_folder(one) for one in given]
    runs = Runs(*(np.array(column, dtype=np.float64) for column in zip(*(row[1:] for row in rows), strict=True)))
    check_runs(runs, str(tables[0]) if tables else WHERE)
    return runs, [str(row[0]) for row in rows]


def check_runs(runs: Runs, where: str) -> None:
    """Raises UserError for too few runs, and for runs that do not tell weights from tokens."""
    count = len(runs.losses)
    if count < LEAST:
        remedy = f"give {LEAST} or more, of at least three sizes and lengths"
        raise UserError(f"{count} runs cannot fix the five numbers of a law", where=where, remedy=remedy)
    if (highest := float(runs.losses.max())) > HIGHEST:
        what, why = f"a loss of {highest:g} nats a token", "perplexities, perhaps, whose logarithms are losses"
        raise UserError(what, where=where, why=why, remedy="give the mean of -ln p of held-out tokens")
    sizes, lengths = len(np.unique(runs.parameters)), len(np.unique(runs.tokens))
    if sizes < 3 or lengths < 3:
        what = f"the runs have {sizes} sizes of model and {lengths} numbers of tokens"
        why = "what weights do and what tokens do cannot be told apart"
        raise UserError(what, where=where, why=why, remedy="give three or more of both")


def _rows(path: Path) -> list[tuple[Any, ...]]:
    with reading(path, "CSV", ValueError, remedy=f"the columns are {COLUMNS}"), path.open(newline="") as file:
        first = file.readline()
        file.seek(0)
        table = csv.DictReader(file, delimiter=";" if ";" in first and "," not in first else ",")
        names = {ALSO.get(name.strip().lower(), name.strip().lower()): name for name in table.fieldnames or []}
        _check_columns(path, [*names])
        return [_row(path, line, {key: row[name] for key, name in names.items()}) for line, row in enumerate(table, 2)]


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in ("params", "loss") if name not in names]
    if "tokens" not in names and "flops" not in names:
        missing.insert(1 if missing[:1] == ["params"] else 0, "tokens or flops")
    if not missing:
        return
    why = f"it has {', '.join(names) or 'none'}"
    if "loss" in missing and any("bit" in name or "bpb" in name for name in names):
        why += "; a law of bits per byte would be read as one of nats a token"
        remedy = "add a column loss: bits per byte x bytes / tokens x 0.6931"
        raise UserError("the column loss is missing", where=str(path), why=why, remedy=remedy)
    raise UserError(
        f"the column {missing[0]} is missing", where=str(path), why=why, remedy=f"the columns are {COLUMNS}"
    )


def _row(path: Path, line: int, row: dict[str, str | None]) -> tuple[Any, ...]:
    values = {}
    for name in ("params", "tokens", "flops", "loss"):
        text = (row.get(name) or "").strip()
        if name in row and not (name in ("tokens", "flops") and not text):
            try:
                values[name] = float(text)
            except ValueError:
                values[name] = math.nan
            if not 0 < values[name] < math.inf:
                what, remedy = f"{name}={text!r} is not a number above 0", "correct the row, or remove it"
                raise UserError(what, where=f"{path}, line {line}", remedy=remedy)
    if "tokens" not in values and "flops" not in values:
        raise UserError("neither tokens nor flops", where=f"{path}, line {line}", remedy="give one of them")
    tokens = values.get("tokens") or values["flops"] / (6 * values["params"])
    return f"line {line}", values["params"], tokens, values["loss"]


def _of_folder(given: str) -> tuple[Any, ...]:
    folder = find_run(given)
    size = 0.0
    for event in read_ledger(folder.ledger_file):
        if event["event"] == "start":
            size = number(event.get("parameters"))
    remedy = "train it to its end, where it is scored, or leave it out"
    loss = final_loss(folder)
    if loss is None or not size > 0:
        raise UserError("the run has no score of held-out text", where=str(folder.path), remedy=remedy)
    last = sorted(folder.path.glob(SCORES))[-1]
    return folder.path.name, size, number(read_json(last, remedy=remedy).get("tokens")), loss


def final_loss(folder: RunFolder) -> float | None:
    """Return a run's newest loss on held-out text, nats a token; None where it has none. Raises UserError."""
    scored = sorted(folder.path.glob(SCORES))
    if not scored:
        return None
    last = read_json(scored[-1], remedy="leave the run out")
    scores = last.get("scores")
    score = number(scores.get("bits_per_byte")) if isinstance(scores, dict) else math.nan
    tokens = number(last.get("document_tokens"))
    loss = score * math.log(2) * number(last.get("bytes")) / tokens if tokens > 0 else math.nan
    return loss if 0 < loss < math.inf else None
