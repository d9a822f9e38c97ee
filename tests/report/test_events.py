"""Every kind of event is marked on the curves."""

from pathlib import Path

from ledgers import INTERRUPTED, page_run, run_of


def test_every_kind_of_event_is_marked_where_it_happened(tmp_path: Path) -> None:
    marks = page_run(run_of(tmp_path, "a", INTERRUPTED))["events"]
    found = {kind: (of["step"], of["text"]) for kind, of in marks.items()}
    assert found == {
        "start": ([0], ["2 ranks on a processor"]),
        "changed": ([5], ["optimizer.learning_rate: 0.001 → 0.002"]),
        "save": ([5], ["10 B, kept forever"]),
        "eval": ([10], ["heldout 1.5000 bits per byte"]),
        "restore": ([5], ["the run is going on"]),
        "fallback": ([5], ["step-00000007: a hash is wrong"]),
        "stop": ([10], ["done"]),
    }
