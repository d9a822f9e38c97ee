"""The front door: from a command to the module that has it. Nothing else, so that `--help` is instant."""

import difflib
import importlib
import importlib.metadata
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {  # command: (module:function, called with argv and giving the exit status; one line of help)
    "data": ("minka.data.command:main", "turn documents into a token store"),
    "train": ("minka.train.command:main", "train a recipe, a run.toml, or go on with a run"),
    "eval": ("minka.eval.command:main", "score a checkpoint of a run"),
    "export": ("minka.checkpoint.command:main", "write a checkpoint as a Hugging Face folder"),
    "report": ("minka.report.command:main", "show runs as one HTML page"),
    "doctor": ("minka.train.command:doctor", "is this machine, and this recipe, fit to train?"),
}
DONE, FAILED, REFUSED = 0, 1, 2  # minka.plan.errors has the whole table; the front door imports nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return DONE
    if command in ("-V", "--version"):
        print(f"minka {version()}")
        return DONE
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"Did you mean `minka {near[0]}`? " if near else ""
        print(f"minka: there is no command {command!r}. {meant}Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return REFUSED
    module, function = COMMANDS[command][0].split(":")
    try:
        return int(getattr(importlib.import_module(module), function)(rest))
    except KeyboardInterrupt:  # commands handle their own; this one came while they were being imported
        print("minka: stopped before anything began.", file=sys.stderr)
        return FAILED


def usage() -> str:
    """What `minka --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "minka: pretrain language models on a budget you can defend.",
            "",
            "usage: minka COMMAND ...        minka COMMAND --help        minka --version",
            "",
            *rows,
            "",
            "first run, no GPU needed:  minka train demo",
        ]
    )


def version() -> str:
    """The installed version, or that of the source tree this file stands in."""
    try:
        return importlib.metadata.version("minka")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parent / "pyproject.toml"
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
