"""The front door: instant help, nothing heavy imported, a wrong word gets the nearest right one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minka.__main__ import COMMANDS, main

HEAVY = frozenset(
    "torch triton numpy pydantic transformers tokenizers datasets pyarrow plotly safetensors pandas".split()
)
MOST_MODULES = 300  # 160 take a fifth of a second; docs/architecture.md promises less than half of one


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_imports_little_and_nothing_heavy_and_names_the_command(
    command: str, source_environment: dict[str, str]
) -> None:
    script = (
        "import json, sys\nfrom minka.__main__ import main\n"
        f"status = main([{command!r}, '--help'])\n"
        "print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=source_environment, capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert status == 0
    assert HEAVY.isdisjoint(found := {module.split(".")[0] for module in modules}), HEAVY & found
    assert len(modules) < MOST_MODULES
    assert f"minka {command}" in done.stdout


def test_the_front_door_itself_imports_only_the_standard_library(source_environment: dict[str, str]) -> None:
    script = (
        "import sys\nbefore = set(sys.modules)\nimport minka.__main__\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], env=source_environment, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"minka"}


def test_every_command_names_a_module_that_is_there(root: Path) -> None:
    for target, _ in COMMANDS.values():
        module, function = target.split(":")
        source = (root / Path(*module.split(".")[1:])).with_suffix(".py").read_text()
        assert f"\ndef {function}(argv: Sequence[str]) -> int:" in source, target


def test_every_command_module_has_a_command(root: Path) -> None:
    doors = {f"minka.{path.parent.name}.command" for path in root.glob("*/command.py")}
    assert doors == {target.split(":")[0] for target, _ in COMMANDS.values()}


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_lists_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown and line in shown for command, (_, line) in COMMANDS.items())


def test_no_command_at_all_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: minka COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_refused_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "demo"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "'trian'" in refused.err
    assert "`minka train`" in refused.err


def test_a_word_like_no_command_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error
    assert all(command in error for command in COMMANDS)


@pytest.mark.parametrize("argv", [["trian", "demo", "--json"], ["--json", "train", "demo"]])
def test_an_unknown_command_is_json_for_machines(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = json.loads(capsys.readouterr().out)
    assert (printed["where"], printed["status"]) == ("command line", 2)
    assert argv[0] in printed["error"]


def test_version_is_the_projects(root: Path, source_environment: dict[str, str]) -> None:
    """Run with -S (no site-packages), so that an installed minka cannot answer for the source tree."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "minka", "--version"],
        env=source_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'version = "{done.stdout.split()[1]}"' in (root / "pyproject.toml").read_text()


def test_make_help_prints_every_target_with_what_it_does(root: Path) -> None:
    # `make test` hands its own flags on, and a make within a make says which folder it enters.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "help"], cwd=root, env=alone, capture_output=True, text=True, check=True)
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    assert shown.keys() == set(targets)
