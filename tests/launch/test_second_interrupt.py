"""The second Ctrl-C: what had been saved, and what the ranks had written of their end, counts."""

import json
import signal
from pathlib import Path

import pytest

from minka.launch import supervisor
from minka.launch.exit_reason_file import write_exit_reason
from minka.launch.supervisor import INTERRUPTED, Ending, Job, supervise
from minka.launch.supervisor_link import ABOVE_RANKS
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder
from tiny import tiny


@pytest.mark.parametrize(
    ("step", "by_ranks", "status", "said"),
    [
        (6, None, ExitStatus.STOPPED, "step 6 is saved"),
        (7, None, ExitStatus.FAILED, "unsaved"),
        (0, None, ExitStatus.FAILED, "unsaved"),
        (7, ExitStatus.STOPPED, ExitStatus.STOPPED, ""),  # they saved, and wrote why they ended
        (7, ExitStatus.NEEDS_PERSON, ExitStatus.NEEDS_PERSON, ""),
    ],
)
def test_a_second_interrupt_after_the_save_loses_nothing(
    step: int,
    by_ranks: ExitStatus | None,
    status: ExitStatus,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The ranks' process does nothing here. They have reported `step`; step 6 is saved."""
    config = tiny(tmp_path)
    folder = RunFolder.of(config)
    (folder.checkpoints / "step-00000006").mkdir(parents=True)
    folder.config_file.touch()
    write_exit_reason(folder, ExitStatus.FAILED, "of the start before", 5)

    def watched(*_: object) -> Ending:
        if by_ranks:
            write_exit_reason(folder, by_ranks, by_ranks.reason, step)
        return Ending(ExitStatus.FAILED, INTERRUPTED, step)

    monkeypatch.setattr(supervisor, "FORKER", "import sys; sys.stdin.read()")
    monkeypatch.setattr(supervisor, "_watch", watched)
    handlers = {number: signal.getsignal(number) for number in ABOVE_RANKS}
    try:
        ending = supervise(Job(config=config, ranks=2))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    recorded = json.loads(folder.exit_file.read_text())
    assert (ending.status, recorded["code"]) == (status, status)
    assert recorded["requeue"] == (said == "step 6 is saved")
    assert said in capfd.readouterr().err
