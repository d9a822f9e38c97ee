"""Every command of benchmarks/ has help, and refuses before it measures what would measure nothing."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text())


def refused(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status with which a command ends before its work."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    main: Callable[[], int] = import_module(f"minka.benchmarks.{command}").main
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_no_unknown_option(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(command, ["--help"], monkeypatch) == 0
    assert f"usage: {command}" in capsys.readouterr().out
    assert refused(command, ["--unknown"], monkeypatch) == 2


def test_a_module_runs_as_a_command_where_it_has_one() -> None:
    guarded = {path.stem for path in FOLDER.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text()}
    assert guarded == set(COMMANDS)
    assert {"checkpoints", "data_path", "gpu_check", "gpu_training", "kernels", "training"} <= guarded


@pytest.mark.parametrize("words", ["gpu_check first", "gpu_check training", "gpu_training", "kernels"])
def test_full_sizes_are_refused_without_a_gpu(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command, *rest = words.split()
    assert refused(command, rest, monkeypatch) == 2
    assert "needs a GPU; --tiny runs anywhere" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["kernels --tiny", "gpu_training --tiny", "training", "checkpoints"])
def test_a_name_that_nothing_has_is_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = words.split()
    assert refused(command, [*rest, "--only", "nope"], monkeypatch) == 2
    assert "no name contains --only 'nope'; the names are: " in capsys.readouterr().err
