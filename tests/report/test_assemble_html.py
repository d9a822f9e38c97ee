"""The page is one file that cannot be broken out of, and a run that is damaged is shown as far as it can be read."""

import base64
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ledgers import event, run_of, start, steps
from minka.plan.errors import UserError
from minka.report.assemble_html import HERE, MARK, SCRIPTS, assemble_html, embed_json, plotly_script
from minka.report.page_data import page_data
from minka.report.run_files import read_run_files
from minka.report.write_report import write_page

HUGE = 10**400  # an integer to JSON, and too large for a float
DEEP = "[" * 100_000
WALKABLE = "[" * 500 + "]" * 500 + "}"  # JSON can be made of it, and then nobody gets through
EVIL = "</script><script>window.pwned=1</script><!--<img src=x onerror='window.pwned=1'>&amp;\u2028"


def page_of(folder: Path) -> str:
    return assemble_html(page_data([read_run_files(str(folder))], 1_700_000_100.0), plotly="")


def test_data_cannot_end_its_script_and_comes_back_unchanged() -> None:
    text = embed_json({EVIL: [EVIL, float("inf")]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {EVIL: [EVIL, "Infinity"]}


def test_what_a_run_says_stands_in_the_data_alone_and_the_title_is_escaped(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "")
    folder = run_of(tmp_path, evil, [start(device=EVIL), *steps(1, 2), event("stop", 2, reason=EVIL)])
    text = page_of(folder.path)
    assert (text.count("<script"), text.count("</script")) == (3, 3)
    title = re.findall("<title>(.*)</title>", text)
    assert title == [f"{html.escape(evil)} · minka report"]
    assert "pwned" not in re.sub(r'<title>.*</title>|<script type="application/json".*?</script>', "", text)


def test_plotly_is_carried_whole(tmp_path: Path) -> None:
    script = gzip.decompress(base64.b64decode(plotly_script()))
    assert len(script) > 1_000_000
    assert b"plotly.js v" in script[:200]


def test_nothing_in_the_page_points_outside(tmp_path: Path) -> None:
    text = page_of(run_of(tmp_path, "a", [start(), *steps(1, 2)]).path)
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_every_file_of_the_page_is_in_it(tmp_path: Path) -> None:
    assert {path.name for path in HERE.iterdir() if path.suffix in (".js", ".css", ".html")} == {
        *SCRIPTS,
        "page.css",
        "page.html",
    }
    text = page_of(run_of(tmp_path, "a", []).path)
    for name in (*SCRIPTS, "page.css"):
        assert (HERE / name).read_text() in text


def test_a_report_replaces_only_a_report(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "report.html"
    write_page(file, f"<html>{MARK}one")
    write_page(file, f"<html>{MARK}two")
    assert file.read_text().endswith("two")
    other = tmp_path / "notes.html"
    other.write_text("mine")
    for place in (other, tmp_path):
        with pytest.raises(UserError) as refused:
            write_page(place, "x")
        assert refused.value.where == str(place)
    assert other.read_text() == "mine"


def test_torn_lines_are_left_out_and_told_by_number(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 4)])
    lines = folder.ledger_file.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"event": "step", "ti\n'
    lines.insert(4, b"\xff\x00\n")
    folder.ledger_file.write_bytes(b"".join(lines) + b'{"event": "st')
    run = read_run_files(str(folder.path))
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
def test_a_line_whose_numbers_are_none_is_left_out_and_told_of(odd: dict[str, Any], tmp_path: Path) -> None:
    run = read_run_files(
        str(run_of(tmp_path, "a", [start(), *steps(1, 1), {**event("step", 2), **odd}, *steps(3, 3)]).path)
    )
    assert [e["step"] for e in run.events] == [0, 1, 3]
    assert run.torn_lines == [3]


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
    page_of(run_of(tmp_path, "a", [start(), *steps(1, 2), *steps(3, 3, **odd)]).path)


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
    text = page_of(run_of(tmp_path, "a", [start(), *steps(1, 2), odd, *steps(3, 4)]).path)
    text.encode()
    assert "inf GB" not in text


@pytest.mark.parametrize(
    "kind", ["start", "save", "eval", "skip", "restore", "fallback", "restart", "rewind", "stop", "save_failed"]
)
def test_an_event_without_its_fields_is_shown_all_the_same(kind: str, tmp_path: Path) -> None:
    page_of(run_of(tmp_path, "a", [start(), *steps(1, 2), event(kind, 2), *steps(3, 4)]).path)


@pytest.mark.parametrize(
    "name", ["provenance.json", "exit_reason.json", "lineage.json", "plan.json", "evals/step-00000002/heldout@1.json"]
)
@pytest.mark.parametrize("text", ["{cut", "[]", "{}", '{"step": 2, "scores": 5}', "\udcff", DEEP, '{"a":' + WALKABLE])
def test_a_file_that_cannot_be_read_costs_its_own_part_only(name: str, text: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    file = folder.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(errors="surrogateescape"))
    run = read_run_files(str(folder.path))
    assert len(run.kept) == 3
    assert bool(run.notes) == (text.startswith(("{cut", "\udcff", "[[", '{"a"')))
    page_of(folder.path)


@pytest.mark.parametrize("step", [HUGE, -HUGE, -1, True, "2"], ids=["huge", "-huge", "-1", "true", "word"])
def test_a_result_of_no_step_is_left_out(step: object, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 3)])
    for at, told in (("1", 1), ("2", step)):
        file = folder.evals / f"step-{at}" / "heldout@1.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"step": told, "tokens": HUGE, "scores": {"bits_per_byte": HUGE, "x": 1}}))
    shown = page_data([read_run_files(str(folder.path))], 0.0)["runs"][0]
    assert shown["scores"]["x"]["step"] == [1]
    assert shown["scores"]["bits_per_byte"]["value"] == [None]


def test_a_configuration_nested_out_of_all_reason_is_said(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    folder.config_file.write_text("a = " + DEEP)
    run = read_run_files(str(folder.path))
    assert (run.config, run.planned, len(run.notes)) == ({}, None, 2)
    page_of(folder.path)


def test_a_configuration_of_another_version_is_shown_without_its_plan(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    folder.config_file.write_text('[run]\nname = "a"\nfuture = 3\n')
    run = read_run_files(str(folder.path))
    assert run.config == {"run.name": "a", "run.future": 3}
    assert run.planned is None
    assert any("run.future" in note for note in run.notes)
    page_of(folder.path)


def test_the_configuration_is_the_one_last_started(tmp_path: Path) -> None:
    lines = [
        start(config={"run": {"name": "a", "max_steps": 3}}),
        *steps(1, 2),
        start(2, config={"run": {"max_steps": 9}}),
    ]
    assert read_run_files(str(run_of(tmp_path, "a", lines).path)).config == {"run.max_steps": 9}


def test_a_plan_in_the_folder_is_shown_as_it_stands(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    assert page_data([read_run_files(str(folder.path))], 0.0)["runs"][0]["plan_file"] is None
    (folder.path / "plan.json").write_text('{"gpu_hours": [1, {"x": 2}]}')
    assert page_data([read_run_files(str(folder.path))], 0.0)["runs"][0]["plan_file"] == {"gpu_hours": [1, {"x": 2}]}
