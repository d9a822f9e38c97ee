"""The supervisor: what it does about signals, hangs and deaths of ranks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from commands import at_step, children, train
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.launch.exit_reason_file import read_exit_reason, write_exit_reason
from minka.launch.supervisor import Ending, Ranks, Signals, complete_exit_reason, ending_of, next_action
from minka.launch.supervisor_link import ABOVE_RANKS, SupervisorLink, handle_stop_signals
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.run_folder import RunFolder
from tiny import tiny


def test_a_rank_is_silent_after_the_limit_and_not_before() -> None:
    ranks = Ranks()
    ranks.heartbeat("0 100 5", now=10.0)
    ranks.heartbeat("1 101 5", now=12.0)
    assert ranks.silent(now=12.5, seconds=3) == []
    assert ranks.silent(now=13.5, seconds=3) == [0]
    ranks.heartbeat("0 100 5 done", now=13.6)  # it exports, which may take long
    assert ranks.silent(now=99, seconds=3) == [1]
    assert (ranks.pids, ranks.steps) == ({0: 100, 1: 101}, {0: 5, 1: 5})


def test_the_supervisor_passes_signals_on_ends_at_the_second_interrupt_and_sees_a_hang() -> None:
    ranks, signals = Ranks(), Signals()
    assert next_action(ranks, signals, now=0.0, hang_seconds=3) == "wait"
    signals.received = signals.interrupts = 1
    assert next_action(ranks, signals, now=0.0, hang_seconds=3) == "pass on"
    signals.passed_on = 1
    ranks.heartbeat("0 100 5", now=0.0)
    assert next_action(ranks, signals, now=2.0, hang_seconds=3) == "wait"
    assert next_action(ranks, signals, now=4.0, hang_seconds=3) == "hung"
    signals.received = 5  # a scheduler's signals do not count as a second Ctrl-C
    assert next_action(ranks, signals, now=4.0, hang_seconds=3) == "pass on"
    signals.interrupts = 2
    assert next_action(ranks, signals, now=4.0, hang_seconds=3) == "end"


def test_the_ending_follows_from_the_forkers_status_and_whether_a_rank_was_heard() -> None:
    none, some = Ranks(), Ranks()
    some.heartbeat("0 100 5", now=0.0)
    assert ending_of(0, some, stopping=False) == Ending(0, "done", 5)
    assert ending_of(85, some, stopping=True) == Ending(85, "stopped and saved", 5)
    assert ending_of(1, some, stopping=False) == Ending(1, "a rank failed", 5, rank_failed=True)
    assert ending_of(-9, some, stopping=False) == Ending(1, "a rank failed", 5, rank_failed=True)
    assert ending_of(1, none, stopping=False) == Ending(1, "failed before training began", 0)
    assert ending_of(1, none, stopping=True).status == ExitStatus.STOPPED


def test_an_exit_reason_that_the_ranks_wrote_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    failed = Ending(int(ExitStatus.FAILED), "a rank failed", 6)
    write_exit_reason(folder, ExitStatus.FAILED, "theirs", 5)
    theirs = read_exit_reason(folder)
    complete_exit_reason(folder, failed, theirs)
    assert read_exit_reason(folder) == theirs
    complete_exit_reason(folder, Ending(int(ExitStatus.STOPPED), "stopped", 5), None)  # the ranks have written it
    assert read_exit_reason(folder) == theirs
    complete_exit_reason(folder, failed, None)  # theirs was of the session before
    assert json.loads(folder.exit_file.read_text())["reason"] == "a rank failed"
    write_exit_reason(folder, ExitStatus.DONE, "done", 7)
    complete_exit_reason(folder, failed, read_exit_reason(folder))
    ending = json.loads(folder.exit_file.read_text())
    assert (ending["code"], "export failed" in ending["reason"]) == (1, True)


def test_a_stop_saves_and_going_on_gives_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    whole = tiny(tmp_path, run={"name": "whole", "max_steps": 60})
    assert ended(whole, ranks=2)[0] == ExitStatus.DONE
    stopped = tiny(tmp_path, run={"name": "stopped", "max_steps": 60})
    process = train(stopped)
    at_step(stopped, 5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == ExitStatus.STOPPED
    folder = RunFolder.of(stopped)
    reason = json.loads(folder.exit_file.read_text())
    assert (reason["code"], reason["requeue"]) == (85, True)
    assert 5 <= reason["step"] < 60
    assert ended(stopped, ranks=1)[0] == ExitStatus.DONE  # on another number of ranks, too
    one, other = (dict(whole_tensors(checkpoints(RunFolder.of(c).checkpoints)[-1], "model.")) for c in (whole, stopped))
    for name, weight in one.items():
        assert float((weight - other[name]).norm()) <= 1e-4 * float(weight.norm()), name
    assert samples_of(stopped) == samples_of(whole)


def test_an_interrupt_while_preparing_leaves_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    text = "all work and no play makes a long corpus to read through " * 200
    for number in range(3000):
        (tmp_path / "corpus" / f"long-{number}.txt").write_text(f"{number} {text}")
    process = train(config)
    while not list(tmp_path.glob(".store.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == ExitStatus.STOPPED
    assert "nothing to save" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*store*"))
    assert not RunFolder.of(config).path.exists()


@pytest.mark.slow
def test_a_second_interrupt_is_reported_as_what_came_of_it(tmp_path: Path) -> None:
    """The ranks may stop and save before they are ended: then nothing is unsaved."""
    config = tiny(tmp_path, run={"max_steps": 100_000})
    process = train(config)
    at_step(config, 3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate()
    assert process.returncode in (ExitStatus.FAILED, ExitStatus.STOPPED), errors
    assert json.loads(RunFolder.of(config).exit_file.read_text())["code"] == process.returncode
    assert ("stopped at once, unsaved" in errors) == (process.returncode == ExitStatus.FAILED)


def test_signals_while_a_stopped_run_ends_do_not_undo_the_stop(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000}, checkpoint={"export": True})
    process = train(config)
    at_step(config, 3)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):  # as a scheduler sends them
        process.send_signal(number)
        time.sleep(0.1)
    _, errors = process.communicate()
    assert process.returncode == ExitStatus.STOPPED, errors
    assert (RunFolder.of(config).export / "config.json").exists()
    assert json.loads(RunFolder.of(config).exit_file.read_text())["requeue"] is True


# A rank that gets USR2 alone prints its stacks and trains on.
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR2])
def test_a_signal_to_every_process_saves_too(number: signal.Signals, tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000})
    process = train(config)
    at_step(config, 3)
    (forker,) = children(process.pid)
    for pid in [process.pid, forker, *children(forker)]:
        os.kill(pid, number)
    _, errors = process.communicate()
    assert process.returncode == ExitStatus.STOPPED, errors
    assert len(checkpoints(RunFolder.of(config).checkpoints)) == 1


@pytest.mark.slow
def test_a_finished_run_says_so_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert ended(config)[0] == ExitStatus.DONE
    status, output, _ = ended(config)
    assert (status, "finished" in output) == (ExitStatus.DONE, True)
    status, _, errors = ended(config, "run.seed=8")
    assert status == ExitStatus.REFUSED
    assert "run.seed = 8 (was 7)" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_that_hangs_is_stopped_with_its_stacks_written(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000}, guard={"hang_seconds": 20.0})
    process = train(config)
    at_step(config, 2)
    pid = rank_pids(process.pid)[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        _, errors = process.communicate()
    finally:
        with_hands_off(pid)
    assert process.returncode == ExitStatus.HUNG
    assert "no heartbeat from rank" in errors
    assert "rank 1 did not answer, as if it were stopped" in errors
    stacks = (RunFolder.of(config).logs / "stacks-00000.txt").read_text()
    assert "loop.py" in stacks


def test_a_killed_rank_fails_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000})
    process = train(config)
    at_step(config, 2)
    pids = rank_pids(process.pid)
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == ExitStatus.FAILED
    assert "rank 1 ended by signal 9" in errors
    last = errors.rstrip().splitlines()[-1]
    assert last.startswith("minka: training has ended, because a rank failed.")
    assert last.endswith(f"`minka train {RunFolder.of(config).path}` begins again: nothing was saved.")
    assert json.loads(RunFolder.of(config).exit_file.read_text())["code"] == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ranks_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000})
    process = train(config)
    at_step(config, 2)
    pids = rank_pids(process.pid)
    process.kill()
    process.communicate()
    while any(alive(pid) for pid in pids):
        time.sleep(0.05)


def test_signals_that_were_ignored_by_whoever_started_the_process_stay_so_and_its_own_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, signals, both = signal.getsignal(signal.SIGUSR1), Signals(), {signal.SIGUSR1, signal.SIGUSR2}
    try:
        for handler in signals.count, signal.SIG_IGN, signals.count:  # a second supervise in one process
            handle_stop_signals(handler, {signal.SIGUSR1})
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.setattr("minka.launch.supervisor_link.IGNORED_FROM_THE_START", both)
    handle_stop_signals(signals.count, both)
    assert signals.count not in [signal.getsignal(number) for number in both]


@pytest.mark.parametrize("supervised", [True, False])
def test_a_schedulers_sigusr2_stops_ranks_that_no_supervisor_asks_for_stacks(supervised: bool, tmp_path: Path) -> None:
    (read_end, write_end), before = os.pipe(), {number: signal.getsignal(number) for number in ABOVE_RANKS}
    stacks = tmp_path / "logs" / "stacks-00000.txt"
    link = SupervisorLink(0, tmp_path / "STOP", write_end if supervised else None, stacks)
    try:
        signal.raise_signal(signal.SIGUSR2)
        assert link.stop_requested() == (not supervised)
        assert "test_supervisor.py" in stacks.read_text()
        link.close()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for end in (read_end, write_end):
            os.close(end)


def ended(config: RunConfig, *overrides: str, ranks: int = 2) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a whole `minka train`."""
    process = train(config, *overrides, ranks=ranks)
    output, errors = process.communicate()
    return process.returncode, output, errors


def rank_pids(supervisor: int) -> list[int]:
    """Processes two below the supervisor, oldest first: rank 0, rank 1, ..."""
    (forker,) = children(supervisor)
    return sorted(children(forker))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def with_hands_off(pid: int) -> None:
    """Let a stopped process go on, if it is still there."""
    if alive(pid):
        os.kill(pid, signal.SIGCONT)


def samples_of(config: RunConfig) -> dict[int, list[int]]:
    """Step to the sample ids that all ranks together trained on."""
    found: dict[int, list[int]] = {}
    for file in sorted(RunFolder.of(config).logs.glob("samples-*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(entry["samples"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}
