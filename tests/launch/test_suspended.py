"""A run that sleeps is not ended as one that hangs, and signals that it was started to ignore are ignored."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import at_step, children, environment, train, written
from minka.launch.supervisor import TURN_SECONDS, AwakeClock, Ranks, Signals, next_action
from minka.plan.errors import ExitStatus
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from tiny import tiny


def test_sleep_is_not_a_hang_and_a_hang_is_seen_after_any_sleep() -> None:
    """Histories of a supervisor and ranks that are stopped, together or each alone, for seconds or hours."""
    hang, pause = 30.0, 0.2
    for seed in range(100):
        dice = random.Random(seed)
        ranks, clock, now = Ranks(), AwakeClock(), 1000.0
        hangs_at = dice.uniform(100, 400) if seed % 2 else math.inf  # awake seconds
        beat_due, verdict = 0.0, "wait"
        while clock.seconds < 600:
            if dice.random() < 0.01:  # both are stopped, or the supervisor alone: then the pipe holds heartbeats
                now += dice.choice([5.0, 40.0, 3600.0, 86_400.0])
                beat_due = dice.choice([0.0, beat_due])
            else:
                now += dice.uniform(0, pause) if dice.random() < 0.95 else dice.uniform(0, 3)  # a machine under load
            awake = clock.tick(now)
            if awake >= beat_due and awake < hangs_at:
                ranks.heartbeat("0 100 5", awake)
                beat_due = awake + dice.uniform(0, hang - 2 * TURN_SECONDS)
            verdict = next_action(ranks, Signals(), awake, hang)
            if verdict == "hung":
                break
        assert (verdict == "hung") == (hangs_at < math.inf), seed
        if verdict == "hung":
            assert hangs_at <= clock.seconds <= hangs_at + hang + TURN_SECONDS, seed


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_for_longer_than_a_hang_ends_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000}, guard={"hang_seconds": 3.0})
    process = train(config)
    at_step(config, 2)
    (forker,) = children(process.pid)
    for stopped in ([process.pid], [process.pid, forker, *children(forker)]):
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        at_step(config, max(e["step"] for e in read_ledger(RunFolder.of(config).ledger_file)) + 5)
        time.sleep(1)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == ExitStatus.STOPPED


@pytest.mark.slow
def test_a_signal_that_a_run_was_started_to_ignore_is_ignored_by_all_of_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, run={"max_steps": 100_000})
    held = f"trap '' HUP INT; exec {sys.executable} -m minka train {written(config)} --ranks 2"  # as nohup does
    process = subprocess.Popen(["bash", "-c", held], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        at_step(config, 2)
        (forker,) = children(process.pid)
        for pid in (process.pid, forker, *children(forker)):
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGINT)
        at_step(config, max(e["step"] for e in read_ledger(RunFolder.of(config).ledger_file)) + 10)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
        assert process.returncode == ExitStatus.STOPPED
    finally:
        process.kill()
