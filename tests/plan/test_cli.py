"""What commands print: JSON whatever the numbers, tables on a terminal and elsewhere, usage errors as JSON, too."""

import io
import json
from typing import NamedTuple

import pytest
import typer

from minka.plan.cli import new_app, print_error, print_json, print_table, run_app
from minka.plan.errors import ExitStatus, UserError, visible


class Row(NamedTuple):
    """As the commands have them."""

    name: str
    value: float


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def test_numbers_that_are_not_finite_are_null_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": [float("nan"), (float("inf"), -float("inf"))], "row": Row("NaN", 0.1), "none": None, "n": 3}
    print_json(value)
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {"a": [None, [None, None]], "row": ["NaN", 0.1], "none": None, "n": 3}


class Terminal(io.StringIO):
    """A file that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_table_is_aligned_by_spaces_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("loss", 3.5), ("bits", "[b]1")], ["name", "value"])
    assert capsys.readouterr().out.splitlines() == ["name  value", "loss  3.5", "bits  [b]1"]
    print_table([], ["name"])
    print_table([])
    assert capsys.readouterr().out == "name\n"


def test_a_table_on_a_terminal_is_drawn_and_its_cells_are_not_markup() -> None:
    terminal = Terminal()
    print_table([("loss", "[b]1")], ["name", "value"], title="all", file=terminal)
    shown = terminal.getvalue()
    assert all(word in shown for word in ("all", "name", "value", "loss", "[b]1"))
    assert len(shown.splitlines()) > 3


TRAPS = "\x1b[2J \r \x00 \u202e \u2028 \n \ud800 \x9b \u200b"


def test_control_characters_are_shown_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(TRAPS) == r"\x1b[2J \r \x00 \u202e \u2028 \n \ud800 \x9b \u200b"
    assert visible("a\tb\n", keep="\n\t") == "a\tb\n"
    for text in ("naïve データ 🙂 \\n", "日本\u3000語", "12\u202f345\u00a0km", "می\u200cخواهم", "👩\u200d💻"):
        assert visible(text) == text
    assert visible("\u2066\u200f\ufeff\u00ad\u2029") == r"\u2066\u200f\ufeff\xad\u2029"
    print_error(UserError(TRAPS, where=TRAPS, why=TRAPS, remedy=TRAPS), as_json=False)
    print_table([(TRAPS, 1)], title=TRAPS)
    print_table([(TRAPS, 1)], title=TRAPS, file=(terminal := Terminal()))
    printed = capsys.readouterr()
    assert printed.err.count(r"\x1b[2J \r") == 4
    assert printed.out.count(r"\x1b[2J \r") == 2
    assert r"\x1b[2J \r" in terminal.getvalue()
    for shown in (printed.err, printed.out, terminal.getvalue()):
        assert not set(TRAPS) - set(" [2J\n") & set(
            shown.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "")
        )


@pytest.mark.parametrize("argv", [["a", "--bad"], ["a", "b"], ["a", "--times", "0"], ["a", "--times"], ["--quick"]])
def test_a_usage_error_is_one_paragraph_and_one_json_document(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    app = new_app("Do it.")

    @app.command()
    def do(
        name: str,
        times: int = typer.Option(1, min=1),
        quick: bool = typer.Option(False),
        as_json: bool = typer.Option(False, "--json"),
    ) -> None:
        pytest.fail("it was called")

    assert run_app(app, argv, "minka do") == ExitStatus.REFUSED
    plain = capsys.readouterr()
    assert (plain.out, plain.err.count("\n")) == ("", 1)
    assert run_app(app, ["--json", *argv], "minka do") == ExitStatus.REFUSED
    printed = json.loads(capsys.readouterr().out)
    assert (printed["where"], printed["status"]) == ("command line", ExitStatus.REFUSED)
    assert printed["error"] in plain.err
    assert "minka do --help" in printed["remedy"]
