"""The ledger's file: whatever is in it, what is read of it are events, and the rest is told of by line."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ledgers import event, steps
from minka.plan import ledger as ledger_module
from minka.plan.ledger import DEEPEST, Ledger, is_count, lines_from_end, number, parse_json, read_ledger

HUGE = 10**400  # an integer to JSON, and too large for a float
NO_COUNTS: tuple[Any, ...] = ("x", -1, 1.5, True, None, [1], HUGE, 2**63)
NO_TIMES: tuple[Any, ...] = ("now", "NaN", float("nan"), 1e15, HUGE, True, None)
NO_WORDS: tuple[Any, ...] = ([1], 3, "<b>", "", {}, None)


def nested(deep: int) -> str:
    return "[" * deep + "]" * deep


def step(**fields: Any) -> str:
    return json.dumps({**event("step", 2), **fields})


@pytest.mark.parametrize(
    "odd",
    [
        nested(100_000),
        "[" * 100_000,
        step(reason=7).replace("7", nested(900), 1),
        step(reason="x").replace('"x"', nested(DEEPEST)),
        step(loss="x").replace('"x"', "9" * 5000),
        *(step(step=bad) for bad in NO_COUNTS),
        *(step(tokens=bad) for bad in NO_COUNTS),
        *(step(time=bad) for bad in NO_TIMES),
        *(step(event=bad) for bad in NO_WORDS),
        *('{"event": "step"}', "5", "null", "[]"),
    ],
)
def test_a_line_that_is_no_event_is_left_out_and_told_of(odd: str, tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    good = [json.dumps(line) for line in (*steps(1, 1), *steps(3, 3))]
    file.write_text("\n".join([good[0], odd, good[1]]) + "\n")
    torn: list[int] = []
    assert [line["step"] for line in read_ledger(file, torn.append)] == [1, 3]
    assert torn == [2]


def test_what_is_nested_as_deep_as_events_are_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text(step(reason="x").replace('"x"', nested(DEEPEST - 2)) + "\n")
    (line,) = read_ledger(file)
    assert json.dumps(line["reason"]) == nested(DEEPEST - 2)
    for text in (nested(DEEPEST), nested(100_000), '{"a":' * DEEPEST + "1" + "}" * DEEPEST):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)


def test_a_run_may_be_called_by_a_word_that_elsewhere_is_a_number(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    settings = {"config": {"run": {"name": "NaN"}}, "changed": {"run.folder": ["Infinity", "a"]}, "lineage": ["NaN"]}
    ledger.append("start", step=0, tokens=0, threads=float("inf"), **settings)
    ledger.close()
    (line,) = read_ledger(tmp_path / "ledger.jsonl")
    assert {name: line[name] for name in settings} == settings
    assert line["threads"] == float("inf")


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
@pytest.mark.parametrize("text", [b"", b"one", b"one\n", b"\n\none\n\ntwo two\nthree", b"a" * 200 + b"\n" + b"b\n" * 9])
def test_a_file_read_from_its_end_has_the_same_lines_and_their_places(
    text: bytes, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "BLOCK_BYTES", block)
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(text)
    with file.open("rb") as binary:
        found = list(lines_from_end(binary))
    assert [line for _, line in reversed(found)] == [line for line in text.split(b"\n") if line]
    assert all(text[at : at + len(line)] == line for at, line in found)


def test_opening_a_long_ledger_reads_its_end_only(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.touch()
    with file.open("r+b") as long:
        long.truncate(1 << 26)
    tracemalloc.start()
    try:
        ledger = Ledger(file)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20
    ledger.append("stop", step=1, tokens=2)
    ledger.close()
    with file.open("rb") as long:
        long.seek(1 << 26)
        assert long.read(2) == b"\n{"  # the last line had no end


def test_numbers_are_numbers_and_counts_are_counts() -> None:
    assert [number(value) for value in (3, 0.5, float("inf"))] == [3.0, 0.5, float("inf")]
    assert all(math.isnan(number(value)) for value in (*NO_TIMES[:3], HUGE, -HUGE, True, None, []))
    assert is_count(0)
    assert is_count(2**63 - 1)
    assert not any(is_count(value) for value in NO_COUNTS)
