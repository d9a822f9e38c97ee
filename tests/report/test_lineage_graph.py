"""The lineage graph has a lane for each run, parents first, a link for each fork, a row for each resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledgers import event, run_of, start, steps
from minka.plan.run_folder import RunFolder
from minka.report.lineage_graph import MAX_ROWS, history_rows, lineage_graph
from minka.report.run_files import RunFiles


def drawn(*folders: RunFolder) -> dict[str, Any]:
    return lineage_graph([RunFiles(str(folder.path)) for folder in folders], [f.path.name for f in folders])


def comes_from(folder: RunFolder, *parents: tuple[Path, int]) -> None:
    lineage = [
        {"run": path.name, "folder": str(path), "step": step, "tokens": 1, "sha256": "ab" * 32, "with": "weights",
         "changed": {"schedule.kind": ["cosine", "wsd"]}}
        for path, step in parents
    ]  # fmt: skip
    (folder.path / "lineage.json").write_text(json.dumps({"format": 1, "parents": lineage}))


def links(graph: dict[str, Any]) -> set[tuple[str, int, str]]:
    """(parent, step, child) of each link."""
    rows, lanes = graph["rows"], graph["lanes"]
    named = [(rows[a], rows[b]) for a, b in graph["links"]]
    return {(lanes[a["lane"]]["name"], a["step"], lanes[b["lane"]]["name"]) for a, b in named}


def test_a_chain_of_parents_that_are_not_on_the_page_is_drawn_from_the_child_alone(tmp_path: Path) -> None:
    child = run_of(tmp_path, "child", [start(), *steps(1, 2)])
    comes_from(child, (tmp_path / "mid", 20), (tmp_path / "base", 80))
    graph = drawn(child)
    assert [(lane["name"], lane["run"]) for lane in graph["lanes"]] == [("base", None), ("mid", None), ("child", 0)]
    assert links(graph) == {("base", 80, "mid"), ("mid", 20, "child")}
    assert "from mid at step 20, with schedule.kind: cosine → wsd" in graph["rows"][-1]["text"]


def test_two_children_of_one_parent_fork_from_its_own_lane(tmp_path: Path) -> None:
    base = run_of(tmp_path, "base", [start(), *steps(1, 9), event("stop", 9, reason="done")])
    one, two = (run_of(tmp_path, name, [start(), *steps(1, 2)]) for name in ("one", "two"))
    comes_from(one, (base.path, 5))
    comes_from(two, (base.path, 9))
    graph = drawn(two, base, one)
    assert [lane["name"] for lane in graph["lanes"]] == ["base", "two", "one"]
    assert [lane["run"] for lane in graph["lanes"]] == [1, 0, 2]
    assert links(graph) == {("base", 5, "one"), ("base", 9, "two")}
    own = [(row["kind"], row["step"]) for row in graph["rows"] if row["lane"] == 0]
    assert own == [("start", 0), ("fork", 5), ("stop", 9), ("fork", 9)]


def test_a_resume_is_one_row_with_the_steps_to_repeat_and_the_changed_settings(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        "a",
        [
            start(),
            *steps(1, 8),
            event("fallback", 5, path="x/step-00000007", reason="a hash is wrong"),
            event("restore", 5, reason="the run is going on"),
            start(5, changed={"run.max_steps": [8, 20]}),
            *steps(6, 10),
        ],
    )
    rows = history_rows(RunFiles(str(run.path)))
    assert [(row["kind"], row["step"], row["title"]) for row in rows] == [
        ("start", 0, "started"),
        ("fallback", 5, "checkpoint skipped"),
        ("restore", 5, "resumed"),
    ]
    assert rows[1]["text"] == "step-00000007: a hash is wrong"
    assert rows[2]["text"] == "3 steps to repeat; 2 ranks on a processor; run.max_steps: 8 → 20"


def test_a_run_resumed_a_hundred_times_is_folded_in_the_middle(tmp_path: Path) -> None:
    lines = [line for n in range(100) for line in (event("restore", n, reason=""), start(n))]
    rows = history_rows(RunFiles(str(run_of(tmp_path, "a", [start(), *lines]).path)))
    assert len(rows) == MAX_ROWS + 1
    assert [row["title"] for row in rows if row["kind"] == "fold"] == [f"{101 - MAX_ROWS} more"]
    assert (rows[0]["title"], rows[-1]["step"]) == ("started", 99)


def test_a_hugging_face_folder_is_a_parent_too(tmp_path: Path) -> None:
    child = run_of(tmp_path, "child", [start()])
    parent = {"run": "", "folder": "/models/llama", "step": 0, "tokens": 0, "sha256": "cd" * 32, "with": "weights"}
    (child.path / "lineage.json").write_text(json.dumps({"format": 1, "parents": [parent]}))
    graph = drawn(child)
    assert links(graph) == {("llama", 0, "child")}
    assert "from /models/llama at step 0" in graph["rows"][-1]["text"]


@pytest.mark.parametrize(
    "folder", ["/a\0b", "/a\ud800b", "/" + 5000 * "a", "circle"], ids=["nul", "surrogate", "long", "circle"]
)
def test_a_parent_whose_folder_is_not_a_path_is_drawn_by_its_name(folder: str, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    child = run_of(tmp_path, "child", [start(), *steps(1, 2)])
    comes_from(child, (tmp_path / folder, 3))
    lineage = json.loads((child.path / "lineage.json").read_text())
    lineage["parents"][0] |= {"folder": str(tmp_path / folder), "run": "parent", "step": 10**400}
    (child.path / "lineage.json").write_text(json.dumps(lineage))
    assert [lane["name"] for lane in drawn(child)["lanes"]] == ["parent", "child"]


def test_lineage_that_is_mangled_draws_the_run_alone(tmp_path: Path) -> None:
    child = run_of(tmp_path, "child", [start()])
    for text in ('{"parents": 3}', '{"parents": [7, {"run": "x"}]}', "[]", "{cut"):
        (child.path / "lineage.json").write_text(text)
        graph = drawn(child)
        assert [lane["name"] for lane in graph["lanes"]] == ["child"]
        assert graph["links"] == []
