"""Scores come from the ledger and from the files of later evaluations."""

import json
from pathlib import Path

from ledgers import BATCH, page_run, run_of, score, start, steps


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
