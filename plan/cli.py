"""What every command does alike: parse, run, turn errors into one paragraph and an exit status, show progress."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import typer
from typer.main import get_command

from minka.plan.errors import ExitStatus, UserError

SECONDS_BETWEEN_LINES = 5.0


def new_app(help: str) -> typer.Typer:
    """A typer application in the house style."""
    return typer.Typer(help=help, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def run_app(app: typer.Typer, argv: Sequence[str], prog: str) -> int:
    """Run one command's application; its callbacks return an exit status or None for done."""
    try:
        command = get_command(app)
        command.help = command.help or str(app.info.help)  # a lone command would show none
        result = command.main(args=list(argv), prog_name=prog, standalone_mode=False)
        return int(result or 0)
    except UserError as error:
        print_error(error, as_json="--json" in argv)
        return int(error.status)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted; nothing half-made was kept", file=sys.stderr)
        return int(ExitStatus.FAILED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error, or help asked for by giving nothing
            error.show()
            return int(ExitStatus.REFUSED)
        raise


def print_error(error: UserError, *, as_json: bool) -> None:
    """The paragraph on stderr, and for machines one JSON document on stdout."""
    if as_json:
        print_json(error.as_dict())
    print(f"minka: {error}", file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON document on stdout; non-finite numbers are the strings NaN, Infinity, -Infinity, as in the ledger."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=str)
    print(json.dumps(plain, indent=2, allow_nan=False))


def table_lines(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return rows, the first of which is the head, as aligned lines; the columns in `numbers` to the right.

    Not by rich, which takes seconds for the thousands of hosts that a table may have.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if column in numbers else "<" for column in range(len(widths))]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show how far a long piece of work is, on stderr: a bar on a terminal, else a line every few seconds.

    Yields advance(n). A total of None shows a count only.
    """
    if sys.stderr.isatty():
        with _bar(total, what, unit) as move:
            yield move
        return
    done, began, said = 0, time.monotonic(), time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            of = f" of {total:,} ({100 * done / total:.0f} %)" if total else ""
            print(f"{what}: {done:,}{of} {unit}, {said - began:.0f} s", file=sys.stderr, flush=True)

    yield advance


@contextmanager
def _bar(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} " + unit)]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
