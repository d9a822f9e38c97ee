"""With a tokenizer that loses text, every place that shows a score says how much it does not account for."""

import json
from pathlib import Path

import pytest

from commands import minka, written
from minka.data.token_store import TokenStore
from minka.eval.command import main as score
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.plan.scores import caveat, caveat_of
from minka.report.command import main as report
from tiny import tiny
from vocabularies import save_tokenizer


@pytest.mark.slow
def test_a_run_whose_tokenizer_loses_text_says_so_with_every_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer("gaps", tmp_path / "gaps")
    config = tiny(tmp_path, data={"tokenizer": str(tmp_path / "gaps")}, run={"max_steps": 5})
    run = RunFolder.of(config)
    done = minka("train", str(written(config)), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    split = TokenStore.open(Path(config.data.store)).split("validation")
    lost = split.lost_bytes.sum() / split.document_bytes.sum()  # the corpus has digits, the vocabulary has none
    assert 0 < lost < 0.5
    shares = {"bits_per_byte": lost, "bits_per_byte/text": lost}
    (event,) = (event for event in read_ledger(run.ledger_file) if event["event"] == "eval")
    assert event["unaccounted"] == pytest.approx(shares)
    says = f"not comparable: the tokenizer loses {100 * lost:.2g} % of the bytes"
    assert done.stdout.count(says) == 2  # at the evaluation and in the summary
    assert "changes text" in done.stdout
    assert "zlib" not in done.stdout
    assert score([str(run.path)]) == 0
    assert capsys.readouterr().out.count(says) == 2  # altogether and of the one source
    assert score([str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unaccounted"] == pytest.approx(shares)
    assert report([str(run.path)]) == 0
    assert says in capsys.readouterr().err
    assert says in (run.path / "report.html").read_text()


def test_a_share_that_nobody_measured_is_said_to_be_unknown() -> None:
    assert "loses text" in caveat({"bits_per_byte": float("nan")})
    assert caveat({}) == caveat({"bits_per_byte/x": 0.1}) == ""
    assert caveat({"bits_per_byte/x": 0.1}, "bits_per_byte/x") == caveat_of({"unaccounted": {"bits_per_byte": 0.1}})


@pytest.mark.parametrize("found", [None, [], {}, 3, {"bits_per_byte": None}])
def test_results_of_older_versions_need_no_caveat(found: object) -> None:
    assert caveat_of({"unaccounted": found}) == caveat_of({}) == ""
