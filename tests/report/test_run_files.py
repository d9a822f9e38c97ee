"""A damaged run is shown as far as it can be read, and what was skipped is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledgers import event, page_run, run_of, start, steps
from minka.plan.run_folder import RunFolder
from minka.report.assemble_html import embed_json
from minka.report.run_files import RunFiles

HUGE = 10**400  # an integer to JSON, and too large for a float
DEEP = "[" * 100_000
WALKABLE = "[" * 500 + "]" * 500 + "}"  # valid JSON, too deep to be walked


def shown(folder: RunFolder) -> str:
    """The page's data, as it is written into the page."""
    return embed_json(page_run(folder))


def test_torn_lines_are_skipped_and_their_numbers_kept(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 4)])
    lines = folder.ledger_file.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"event": "step", "ti\n'
    lines.insert(4, b"\xff\x00\n")
    folder.ledger_file.write_bytes(b"".join(lines) + b'{"event": "st')
    run = RunFiles(str(folder.path))
    assert run.torn_lines == [3, 5, 7]
    assert [e["step"] for e in run.kept if e["event"] == "step"] == [1, 3, 4]


@pytest.mark.parametrize(
    "odd",
    [
        {"step": "4"},
        {"step": -1},
        {"step": HUGE},
        {"tokens": HUGE},
        {"time": HUGE},
        {"step": 1.5},
        {"tokens": None},
        {"tokens": True},
        {"time": "now"},
        {"time": "NaN"},
        {"event": 3},
        {"event": "<b>"},
    ],
)
def test_a_line_without_valid_numbers_is_skipped_and_its_number_kept(odd: dict[str, Any], tmp_path: Path) -> None:
    run = RunFiles(str(run_of(tmp_path, "a", [start(), *steps(1, 1), {**event("step", 2), **odd}, *steps(3, 3)]).path))
    assert [e["step"] for e in run.events] == [0, 1, 3]
    assert run.torn_lines == [3]


def test_a_configuration_of_another_version_is_shown_without_its_plan(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    folder.config_file.write_text('[run]\nname = "a"\nfuture = 3\n')
    run = RunFiles(str(folder.path))
    assert run.config == {"run.name": "a", "run.future": 3}
    assert run.planned is None
    assert any("run.future" in note for note in run.notes)
    shown(folder)


def test_a_configuration_that_is_nested_too_deeply_becomes_a_note(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    folder.config_file.write_text("a = " + DEEP)
    run = RunFiles(str(folder.path))
    assert (run.config, run.planned, len(run.notes)) == ({}, None, 2)
    shown(folder)


def test_the_configuration_is_the_one_last_started(tmp_path: Path) -> None:
    lines = [
        start(config={"run": {"name": "a", "max_steps": 3}}),
        *steps(1, 2),
        start(2, config={"run": {"max_steps": 9}}),
    ]
    assert RunFiles(str(run_of(tmp_path, "a", lines).path)).config == {"run.max_steps": 9}


def test_a_plan_in_the_folder_is_shown_as_it_stands(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    assert page_run(folder)["plan_file"] is None
    (folder.path / "plan.json").write_text('{"gpu_hours": [1, {"x": 2}]}')
    assert page_run(folder)["plan_file"] == {"gpu_hours": [1, {"x": 2}]}


@pytest.mark.parametrize("step", [HUGE, -HUGE, -1, True, "2"], ids=["huge", "-huge", "-1", "true", "word"])
def test_a_result_without_a_valid_step_is_skipped(step: object, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 3)])
    for at, given in (("1", 1), ("2", step)):
        file = folder.evals / f"step-{at}" / "heldout@1.json"
        file.parent.mkdir(parents=True)
        scores = {"bits_per_byte": HUGE, "x": 1}
        file.write_text(json.dumps({"suite": "heldout", "step": given, "tokens": HUGE, "scores": scores}))
    run = page_run(folder)
    assert run["scores"]["x"]["step"] == [1]
    assert run["scores"]["bits_per_byte"]["value"] == [None]


@pytest.mark.parametrize(
    "name", ["provenance.json", "exit_reason.json", "lineage.json", "plan.json", "evals/step-00000002/heldout@1.json"]
)
@pytest.mark.parametrize("text", ["{cut", "[]", "{}", '{"step": 2, "scores": 5}', "\udcff", DEEP, '{"a":' + WALKABLE])
def test_a_file_that_cannot_be_read_costs_its_own_part_only(name: str, text: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    file = folder.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(errors="surrogateescape"))
    run = RunFiles(str(folder.path))
    assert len(run.kept) == 3
    assert bool(run.notes) == (text.startswith(("{cut", "\udcff", "[[", '{"a"')))
    shown(folder)


@pytest.mark.parametrize(
    "kind", ["start", "save", "eval", "skip", "restore", "fallback", "restart", "rewind", "stop", "save_failed"]
)
def test_an_event_without_its_fields_is_shown_all_the_same(kind: str, tmp_path: Path) -> None:
    shown(run_of(tmp_path, "a", [start(), *steps(1, 2), event(kind, 2), *steps(3, 4)]))


@pytest.mark.parametrize(
    "odd",
    [
        event("save", 2, path="step-00000002", bytes=HUGE, stall_seconds=HUGE),
        event("eval", 2, suite="heldout", scores={"bits_per_byte": HUGE}, stderr={"bits_per_byte": HUGE}),
        start(2, parameters=HUGE, threads=HUGE, changed={"run.max_steps": [HUGE, 1]}),
        event("stop", 2, reason="\ud800", seconds=HUGE),
        event("skip", 2, reason="\ud800", loss=HUGE),
    ],
)
def test_an_event_with_a_number_too_large_to_be_one_is_shown_without_it(odd: dict[str, Any], tmp_path: Path) -> None:
    text = shown(run_of(tmp_path, "a", [start(), *steps(1, 2), odd, *steps(3, 4)]))
    text.encode()
    assert "inf GB" not in text


@pytest.mark.parametrize(
    "odd",
    [
        {"loss": "x"},
        {"loss": None},
        {"seconds": 3},
        {"seconds": {"data": "x"}},
        {"grad_norm": []},
        {"learning_rate": True},
        {"mfu": {}},
        {"loss": HUGE},
        {"loss": -HUGE, "grad_norm": HUGE, "tokens_per_second": HUGE},
        {"seconds": {"compute": HUGE, "save": HUGE}},
    ],
)
def test_a_step_with_an_odd_field_is_shown_without_it(odd: dict[str, Any], tmp_path: Path) -> None:
    shown(run_of(tmp_path, "a", [start(), *steps(1, 2), *steps(3, 3, **odd)]))
