"""Scores come from the ledger and from the files of later evaluations."""

import json
from pathlib import Path

from configs import SEQ, values
from ledgers import BATCH, BEGAN, page_run, run_of, score, start, steps
from minka.plan.load_config import validate
from minka.plan.run_folder import RunFolder
from minka.report.page_data import page_data
from minka.report.run_files import RunFiles


def test_scores_made_afterwards_join_those_of_the_ledger(tmp_path: Path) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 6), score(6, 1.5)])
    for step, name, bits in (
        (4, "heldout@1", 1.75),
        (6, "heldout@1", 1.0),
        (4, "heldout@1-abcd", 1.8),
        (9, "heldout@1", 0.1),
    ):
        (folder.evals / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        result = {
            "suite": "heldout",
            "step": step,
            "tokens": step * BATCH,
            "scores": {"bits_per_byte": bits},
            "stderr": {},
        }
        (folder.evals / f"step-{step:08d}" / f"{name}.json").write_text(json.dumps(result))
    found = page_run(folder)["scores"]
    assert {name: (s["step"], s["value"], s["seconds"]) for name, s in found.items()} == {
        "bits_per_byte": ([4, 6], [1.75, 1.5], [4.5, 6.5]),  # step 9 is of steps that do not count
        "heldout@1-abcd: bits_per_byte": ([4], [1.8], [4.5]),
    }


def test_numbers_of_different_documents_are_different_scores_and_best_is_of_the_runs_own(tmp_path: Path) -> None:
    """Resumed with fewer documents, then with all again; scored on more once by `minka eval`."""
    few, own = configured(max_documents=2), configured(max_documents=0)
    events = [start(config=few), *steps(1, 3), score(3, 0.5), start(3, 3.5, config=own), *steps(4, 6), score(6, 1.5)]
    folder = run_of(tmp_path, "a", events)
    afterwards(folder, 4, "heldout@1-abcd", 1.25, max_documents=7)
    afterwards(folder, 5, "heldout@1-ef01", 1.75, max_documents=0)  # named by a hash when the run's own were others
    run = page_run(folder)
    assert {name: (s["step"], s["value"]) for name, s in run["scores"].items()} == {
        "bits_per_byte": ([5, 6], [1.75, 1.5]),
        "heldout max_documents=2: bits_per_byte": ([3], [0.5]),
        "heldout max_documents=7: bits_per_byte": ([4], [1.25]),
    }
    assert run["headline"]["best"] == {"suite": "heldout", "step": 6, "bits_per_byte": 1.5, "stderr": 0.25}
    assert run["headline"]["bits_per_byte"] == 1.5


def test_runs_scored_on_different_documents_are_told_apart(tmp_path: Path) -> None:
    events = [start(), *steps(1, 2), score(2, 1.5)]
    runs = [run_of(tmp_path, "a", events), run_of(tmp_path, "b", events, eval={"max_documents": 5})]
    one, two = page_data([RunFiles(str(folder.path)) for folder in runs], BEGAN)["runs"]
    assert one["scores"].keys() == two["scores"].keys()  # both are drawn
    assert one["warnings"] == []
    assert two["warnings"] == [
        "scored with other settings than a (max_documents 5 against 0): their scores are not comparable"
    ]


def configured(**settings: int) -> dict[str, object]:
    return validate(values(eval=settings), "a test").model_dump(mode="json")


def afterwards(folder: RunFolder, step: int, name: str, bits: float, max_documents: int) -> None:
    """A result as `minka eval` writes it."""
    place = folder.evals / f"step-{step:08d}"
    place.mkdir(parents=True)
    settings = {"max_documents": max_documents, "window": SEQ, "stride": SEQ // 2}
    result = {"suite": "heldout", "step": step, "tokens": step * BATCH, "settings": settings, "stderr": {}}
    (place / f"{name}.json").write_text(json.dumps({**result, "scores": {"bits_per_byte": bits}}))
