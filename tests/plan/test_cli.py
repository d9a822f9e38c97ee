"""What commands print for machines is JSON, whatever numbers are in it."""

import json
from typing import NamedTuple

import pytest

from minka.plan.cli import print_json
from minka.plan.ledger import finite


class Row(NamedTuple):
    """As the commands have them."""

    name: str
    value: float


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_non_finite_numbers_are_printed_as_the_ledger_writes_them(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": [float("nan"), (float("inf"), -float("inf"))], "row": Row("NaN", 0.1), "none": None, "n": 3}
    print_json(value)
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == finite(value)
    assert printed["a"] == ["NaN", ["Infinity", "-Infinity"]]
