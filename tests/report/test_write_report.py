"""A report replaces only reports."""

from pathlib import Path

import pytest

from minka.plan.errors import UserError
from minka.report.assemble_html import MARK
from minka.report.write_report import write_page


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
