"""Errors of reading name the file, the reason and what to do."""

from pathlib import Path

import pytest

from minka.plan.errors import UserError
from minka.plan.read_file import read_json, reading


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, None])
def test_what_is_not_a_json_object_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="JSON") as caught:
        read_json(file, why="it says b", remedy="write it again")
    assert (caught.value.where, caught.value.why, caught.value.remedy) == (str(file), "it says b", "write it again")
    assert "\n" not in caught.value.what


def test_a_json_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}


def test_only_expected_errors_are_translated(tmp_path: Path) -> None:
    for error in (OSError("one\ntwo"), EOFError("one")):
        with (
            pytest.raises(UserError, match=r"read as a table: one\.$"),
            reading(tmp_path, "a table", EOFError),
        ):
            raise error
    with pytest.raises(ZeroDivisionError), reading(tmp_path, "a table", EOFError):
        raise ZeroDivisionError
