"""The front door: maps a command to its module. It imports nothing else, so that `--help` is instant."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # command: (module:function, which takes argv and returns the exit status; one line of help)
    "plan": ("minka.plan.command:main", "what a model counts and costs"),
    "data": ("minka.data.command:main", "turn documents into a token store"),
    "train": ("minka.train.command:main", "train a recipe or a run.toml, or resume a run"),
    "eval": ("minka.eval.command:main", "score a checkpoint of a run"),
    "export": ("minka.checkpoint.command:main", "write a checkpoint as a Hugging Face folder"),
    "report": ("minka.report.command:main", "show runs as one HTML page"),
    "doctor": ("minka.train.command:doctor", "check whether this machine can train, or train this recipe"),
}
USAGE = """\
minka: pretrain language models on a budget you can defend.

usage: minka COMMAND ...        minka COMMAND --help        minka --version

{commands}

first run, no GPU needed:  minka train demo"""
DONE, FAILED, REFUSED = 0, 1, 2  # minka.plan.errors has the whole table; the front door imports nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    if argv is not None:
        return run_command(list(argv) or ["--help"])
    output = importlib.import_module("minka.plan.console_output")
    output.install_output()
    return int(output.status_with_output(run_command(sys.argv[1:] or ["--help"])))


def run_command(words: Sequence[str]) -> int:
    """Run the command that the first word names; its exit status."""
    command, *rest = words
    if command in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<6}  {line}" for name, (_, line) in COMMANDS.items())))
        return DONE
    if command in ("-V", "--version"):
        print(f"minka {importlib.import_module('minka.plan.version').version()}")
        return DONE
    if command not in COMMANDS:
        return unknown_command(command, as_json="--json" in (command, *rest))
    module, function = COMMANDS[command][0].split(":")
    try:
        return int(getattr(importlib.import_module(module), function)(rest))
    except KeyboardInterrupt:  # commands handle their own; this one came during their import
        print("minka: interrupted before the command started.", file=sys.stderr)
        return FAILED


def unknown_command(command: str, *, as_json: bool) -> int:
    """Print that there is no such command, and the nearest one."""
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    errors, cli = (importlib.import_module(f"minka.plan.{name}") for name in ("errors", "cli"))
    error = errors.UserError(
        f"there is no command {command!r}",
        where="command line",
        why=f"did you mean `minka {near[0]}`?" if near else "",
        remedy=f"commands: {', '.join(COMMANDS)}",
    )
    cli.print_error(error, as_json=as_json)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
