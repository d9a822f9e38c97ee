"""docs/numbers.md has the accuracy tables as the planner computes them today."""

import pytest

from minka.benchmarks import plan_accuracy
from minka.benchmarks.plan_accuracy import BEGIN, END, PAGE


@pytest.mark.parametrize("table", plan_accuracy.TABLES, ids=lambda table: table.__name__)
def test_the_page_has_the_tables_of_today(table: object) -> None:
    assert callable(table)
    page = PAGE.read_text(encoding="utf-8")
    written = page.split(BEGIN)[1].split(END)[0]
    for line in table():
        assert line in written, f"{line}: run python -m minka.benchmarks.plan_accuracy --write"


def test_published_activations_are_within_five_percent() -> None:
    cells = [row.strip(" |").split(" | ") for row in list(plan_accuracy.korthikanti_rows())[4:]]
    errors = [float(row[at].removesuffix("%")) for row in cells for at in (2, 4)]
    assert len(errors) == 8
    assert max(map(abs, errors)) <= 5
