"""A folder whose `auto_map` names code: no command asks whether to run it, and none runs it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, written
from corpora import data_section
from minka.data.prepare import prepare
from minka.data.tokenizer import bytes_tokenizer, load_hf
from minka.plan.errors import UserError
from tiny import corpus, tiny

SECONDS = 300.0


def hostile(folder: Path, canary: Path, *, tokenizer_class: str, file: bool) -> Path:
    """A Hugging Face folder that names code of its own for its tokenizer, configuration and model."""
    bytes_tokenizer().save(folder)
    if not file:
        (folder / "tokenizer.json").unlink()
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    auto_map = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Slow", "code.Fast"],
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": auto_map, "tokenizer_class": tokenizer_class, "chat_template": "{{ 1 / 0 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": auto_map}))
    return folder


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "Fast"])
def test_a_tokenizer_never_asks_and_never_runs_code(
    tokenizer_class: str, file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tmp_path / "mine", tmp_path / "canary", tokenizer_class=tokenizer_class, file=file)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    section = data_section(source="text", paths=[str(corpus(tmp_path / "corpus"))], tokenizer=str(folder))
    if tokenizer_class == "PreTrainedTokenizerFast" and file:  # its code is not needed
        assert load_hf(str(folder), 256).entries == 256
        prepare(section, 256, tmp_path / "store")
        saved = (tmp_path / "store" / "tokenizer" / "tokenizer_config.json").read_text()
        assert "auto_map" not in saved
    else:
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            prepare(section, 256, tmp_path / "store")
        assert "tokenizer.json" in caught.value.remedy
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_no_command_asks_on_a_terminal(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "mine", tmp_path / "canary", tokenizer_class="Fast", file=True)
    run = str(written(tiny(tmp_path)))
    for command in (
        ["data", "prepare", run, f"data.tokenizer={folder}", "data.store="],
        ["train", run, f"data.tokenizer={folder}", "data.store="],
        ["train", run, f"run.start_from={folder}"],
        ["train", run, f"run.start_from={folder}", "--dry-run"],
    ):
        ours, theirs = pty.openpty()
        os.write(ours, b"y\ny\ny\n")
        done = subprocess.run(
            [sys.executable, "-m", "minka", *command],
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1"),
            check=False,
        )
        os.close(ours)
        os.close(theirs)
        assert done.returncode == 2, (command, done.stderr)
        assert "[y/N]" not in done.stdout + done.stderr
        assert not (tmp_path / "canary").exists(), command
