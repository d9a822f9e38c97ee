"""A run and those that start from it: made by the real worker, read by their ledgers."""

import contextlib
import io
import json
import shutil
from typing import Any

import pytest

from minka.launch.supervisor_link import SupervisorLink
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import current, read_ledger
from minka.plan.load_config import load_run
from minka.plan.run_folder import RunFolder
from minka.train.command import main
from ranks import on_ranks
from tiny import tiny, train_rank

TOLD = ("loss", "grad_norm", "learning_rate", "target_count", "tokens")  # of a step, what no clock decides


def stable_phase(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 20 steps at a constant rate, with checkpoints of every fifth and an export."""
    kept = {"every_steps": 5, "keep": 9, "export": True}
    folder = tmp_path_factory.mktemp("family")
    config = tiny(folder, run={"name": "base"}, schedule={"kind": "constant"}, checkpoint=kept)
    trained(config)
    return RunFolder.of(config)


def fork(base: RunFolder, name: str, start_from: str, *overrides: str) -> RunConfig:
    """A run from another; the parent's run.toml is the template."""
    return load_run(str(base.path), [f"run.name={name}", f"run.start_from={start_from}", *overrides]).config


def copy(base: RunFolder, name: str, *overrides: str) -> RunConfig:
    """The finished run under another name, as if it had been trained there."""
    folder = RunFolder(base.path.parent / name)
    shutil.copytree(base.path, folder.path)
    for file in (folder.config_file, folder.ledger_file):
        file.write_text(file.read_text().replace('"base"', f'"{name}"'))
    return load_run(str(folder.path), overrides).config


def trained(config: RunConfig, ranks: int = 1) -> list[dict[str, Any]]:
    """What counts of the ledger when the run has been trained to its end."""
    assert on_ranks(train_rank, ranks, config) == [0] * ranks
    return ledger(RunFolder.of(config))


def ledger(folder: RunFolder) -> list[dict[str, Any]]:
    """What counts of a run's ledger."""
    return current(read_ledger(folder.ledger_file))


def steps(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The numbers of each step."""
    return {e["step"]: {key: e[key] for key in TOLD} for e in events if e["event"] == "step"}


def samples(folder: RunFolder) -> dict[int, list[int]]:
    """What rank 0 trained on in each step."""
    lines = (folder.logs / "samples-00000.jsonl").read_text().splitlines()
    return {entry["step"]: entry["samples"] for entry in map(json.loads, lines)}


def said(config: RunConfig, *given: str) -> str:
    """What the run says while one rank trains it to its end."""
    (text,) = on_ranks(train_listening, 1, config, *given)
    return str(text)


def train_listening(config: RunConfig, *given: str) -> str:
    """One rank's stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train_rank(config, *given) == 0
    return out.getvalue()


def crash(config: RunConfig, step: int) -> None:
    """Train until the machine is gone: `step` is in the ledger, and nothing was saved for it."""
    with pytest.raises(AssertionError, match="the machine is gone"):
        on_ranks(train_until_crash, 1, config, step)


def train_until_crash(config: RunConfig, step: int) -> int:
    """One rank that ends without farewell."""
    alive = SupervisorLink.heartbeat

    def last(self: SupervisorLink, at: int, *, done: bool = False) -> None:
        alive(self, at, done=done)
        if at == step:
            raise RuntimeError("the machine is gone")

    SupervisorLink.heartbeat = last  # type: ignore[method-assign,assignment]
    return train_rank(config)


def rank_refuses(config: RunConfig, status: int = ExitStatus.REFUSED) -> str:
    """What a rank says that refuses to train."""
    ((found, text),) = on_ranks(train_refusing, 1, config)
    assert found == status, text
    return str(text)


def train_refusing(config: RunConfig) -> tuple[int, str]:
    """One rank that must not get to its first step."""
    try:
        train_rank(config)
    except UserError as error:
        return int(error.status), str(error)
    raise AssertionError("the rank did train")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = ExitStatus.REFUSED) -> str:
    """What `minka train` says when it refuses, before any rank is started."""
    assert main(list(arguments)) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def assert_needs_person(folder: RunFolder, reason: str, step: int) -> None:
    """exit_reason.json says why nothing but a person helps."""
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], ending["step"], ending["requeue"]) == (86, step, False)
    assert reason in ending["reason"]
