"""`minka report` as a user types it: real runs, running runs, runs that do not exist."""

import json
from pathlib import Path

import pytest

from ledgers import ended, event, run_of, start, steps
from minka.plan.errors import ExitStatus
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.report.command import WATCH_SECONDS, main, with_watch_seconds
from minka.report.page_data import PageData
from minka.report.write_report import watch_runs

Trained = tuple[RunFolder, RunFolder]


def test_a_real_run_has_a_page_in_its_folder_and_its_numbers_in_json(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained[0].path), "--json"]) == ExitStatus.DONE
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["page"] == str(trained[0].path / "report.html")
    assert Path(printed["page"]).stat().st_size < 5e6
    events = list(read_ledger(trained[0].ledger_file))
    (run,) = printed["runs"]
    last = [e for e in events if e["event"] == "step"][-1]
    scores = [e["scores"]["bits_per_byte"] for e in events if e["event"] == "eval"]
    assert (run["status"], run["step"], run["tokens"], run["loss"]) == ("finished", 20, last["tokens"], last["loss"])
    assert (run["best"]["bits_per_byte"], run["bits_per_byte"]) == (min(scores), scores[-1])
    assert run["plan"]["steps"] == 20
    assert run["events"] == {"start": 1, "step": 20, "eval": 3, "save": 3, "stop": 1}
    assert (run["torn_lines"], run["notes"], run["path"]) == ([], [], str(trained[0].path))


def test_several_runs_share_a_page_in_the_folder_one_stands_in(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (str(folder.path) for folder in trained)
    assert main([one, two, f"{one}/run.toml", one]) == ExitStatus.DONE
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["one", "two", "report.html"]  # a run given twice is shown once
    assert "finished, step 20 of 20" in said[0]
    assert (tmp_path / "report.html").is_file()


def test_a_run_is_found_by_name_and_out_sets_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path / "runs", "a", [start(), *steps(1, 2)])
    monkeypatch.chdir(tmp_path)
    assert main(["a", "--out", "pages/a.html"]) == ExitStatus.DONE
    assert capsys.readouterr().out.splitlines()[-1] == "pages/a.html"
    assert (tmp_path / "pages" / "a.html").is_file()


def test_a_run_that_does_not_exist_is_one_paragraph_that_names_the_existing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path / "runs", "a", [])
    monkeypatch.chdir(tmp_path)
    assert main(["a", "nobody"]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert "'nobody'" in errors
    assert "runs here: a" in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.rglob("*.html")) == []


def test_a_file_that_is_not_a_report_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path, "a", [])
    before = folder.config_file.read_text()
    assert main([str(folder.path), "--out", str(folder.config_file)]) == ExitStatus.REFUSED
    assert str(folder.config_file) in capsys.readouterr().err
    assert folder.config_file.read_text() == before


def test_a_page_that_cannot_be_written_is_named_with_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(tmp_path, "a", [start()])
    assert main([str(folder.path), "--out", "/proc/page.html"]) == ExitStatus.REFUSED
    errors = capsys.readouterr().err
    assert errors.startswith("minka: /proc/page.html: cannot be written")
    assert "--out FILE.html" in errors


def test_torn_lines_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    with folder.ledger_file.open("a") as ledger:
        ledger.write('{"event": "st')
    assert main([str(folder.path), "--json"]) == ExitStatus.DONE
    said = capsys.readouterr()
    assert "line 4, cut off" in said.err
    assert json.loads(said.out)["runs"][0]["torn_lines"] == [4]


@pytest.mark.parametrize("lines", [[], [start()]])
def test_a_run_without_a_step_has_a_page(
    lines: list[dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(tmp_path, "a", lines)
    if not lines:
        folder.ledger_file.unlink()
    assert main([str(folder.path)]) == ExitStatus.DONE
    said = capsys.readouterr()
    assert "step 0 of 10" in said.out
    assert ("has written nothing yet" in said.err) == (not lines)


def test_watching_writes_again_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])
    seen: list[tuple[int, float]] = []

    def said(file: Path, data: PageData) -> None:
        text = file.read_text()
        again = float(text.split('"refresh_seconds":')[1].split("}")[0])
        seen.append((data["runs"][0]["headline"]["step"], again))

    def go_on(seconds: float) -> None:
        assert seconds == 7
        step = seen[-1][0] + 1
        with folder.ledger_file.open("a") as ledger:
            ledger.writelines(json.dumps(line) + "\n" for line in steps(step, step))
        if step == 4:
            ended(folder, ExitStatus.STOPPED, 4, "stopped and saved")

    monkeypatch.setattr("time.sleep", go_on)
    file, data = watch_runs([str(folder.path)], None, 7, said)
    assert seen == [(2, 7.0), (3, 7.0), (4, 0.0)]  # the last page does not reload itself
    assert (file, data["runs"][0]["status"]["kind"]) == (folder.path / "report.html", "stopped")


def test_interrupted_watching_leaves_a_page_that_stays_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2)])

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    file, _ = watch_runs([str(folder.path)], None, 5, lambda *_: None)
    assert '"refresh_seconds":0.0' in file.read_text()


def test_watching_a_run_that_has_ended_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path, "a", [start(), *steps(1, 2), event("stop", 2, reason="done")])
    assert main([str(folder.path), "--watch"]) == ExitStatus.DONE
    assert capsys.readouterr().out.count("a: finished") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["a", "--watch"], ["a", "--watch", WATCH_SECONDS]),
        (["--watch", "a"], ["--watch", WATCH_SECONDS, "a"]),
        (["--watch", "2.5", "a"], ["--watch", "2.5", "a"]),
        (["a", "--watch", "--json"], ["a", "--watch", WATCH_SECONDS, "--json"]),
        (["a", "--watch=3"], ["a", "--watch=3"]),
    ],
)
def test_seconds_of_watch_may_be_left_out(given: list[str], meant: list[str]) -> None:
    assert with_watch_seconds(given) == meant
