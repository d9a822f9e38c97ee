"""What all commands share: parsing, errors as one paragraph with an exit status, tables, JSON, progress."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer
from typer.main import get_command

from minka.plan.errors import ExitStatus, UserError, visible

SECONDS_BETWEEN_LINES = 5.0


def new_app(help: str) -> typer.Typer:
    """Return a typer application with plain help: rich takes a quarter of a second to import."""
    return typer.Typer(
        help=help, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None
    )


def run_app(app: typer.Typer, argv: Sequence[str], prog: str) -> int:
    """Run one command's application. Its callbacks return an exit status, or None for done."""
    try:
        command = get_command(app)
        command.help = command.help or str(app.info.help)  # a lone command would show none
        for inner in getattr(command, "commands", {}).values():
            inner.short_help = inner.help  # whole: typer would cut it to one line
        return int(command.main(args=list(argv), prog_name=prog, standalone_mode=False) or 0)
    except UserError as error:
        refused = error
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted; nothing half-made was kept", file=sys.stderr)
        return int(ExitStatus.FAILED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors have it; their classes are private
            raise
        if not argv:
            error.show()  # type: ignore[attr-defined]  # the help
            return int(ExitStatus.REFUSED)
        context = getattr(error, "ctx", None)
        remedy = f"`{context.command_path if context else prog} --help` lists what it takes"
        refused = UserError(error.format_message(), where="command line", remedy=remedy)
    print_error(refused, as_json="--json" in argv)
    return int(refused.status)


def print_error(error: UserError, *, as_json: bool) -> None:
    """Print the paragraph on stderr and, with `as_json`, one JSON document on stdout."""
    if as_json:
        print_json(error.as_dict())
    print(f"minka: {error}", file=sys.stderr)


def print_json(value: object) -> None:
    """Print one JSON document. Numbers that are not finite are null: JSON has none, and a string is not a number."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    print(json.dumps(plain, indent=2, allow_nan=False))


def print_table(
    rows: Sequence[Sequence[object]], head: Sequence[str] = (), *, title: str = "", file: TextIO | None = None
) -> None:
    """Print `rows` under `head`: a rich table on a terminal, columns aligned by spaces elsewhere."""
    file = file or sys.stdout
    cells, title = [[visible(str(cell)) for cell in row] for row in rows], visible(title)
    if file.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, title=title or None, show_header=bool(head))
        for row in cells:
            table.add_row(*map(Text, row))  # Text: brackets in a cell are not markup
        Console(file=file).print(table)
        return
    if title:
        print(title, file=file)
    for line in table_lines([list(head), *cells] if head else cells):
        print(line, file=file)


def table_lines(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return rows as aligned lines. The columns in `numbers` are aligned to the right.

    Not by rich, which takes seconds for the thousands of hosts that a table may have.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if column in numbers else "<" for column in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of long work on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Yields advance(n). With a total of None only the count is shown.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} " + unit)]
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done, began, said = 0, time.monotonic(), time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            of = f" of {total:,} ({100 * done / total:.0f} %)" if total else ""
            one = unit.removesuffix("es") if unit.endswith("ches") else unit.removesuffix("s")
            named = one if (total or done) == 1 else unit
            print(f"{what}: {done:,}{of} {named}, {said - began:.0f} s", file=sys.stderr, flush=True)

    yield advance
