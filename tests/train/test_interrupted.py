"""A run that was stopped, or killed, and went on is the run that never was: to the bit, on as many ranks as before."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minka.checkpoint.async_saver import AsyncSaver
from minka.checkpoint.catalogue import checkpoints
from minka.checkpoint.restore import whole_tensors
from minka.data.loader import Loader
from minka.launch.supervisor_link import SupervisorLink
from minka.parallel.engine import Engine
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus
from minka.plan.ledger import current, read_ledger
from minka.plan.run_folder import RunFolder
from minka.train.console import Console
from minka.train.recorder import Recorder
from ranks import on_ranks
from tiny import tiny, train_rank

STEPS = 24
CLOCKS = ("time", "seconds", "tokens_per_second", "mfu", "memory_bytes")
MOMENTS: dict[str, tuple[type, str]] = {  # the points of a cycle, in their order
    "data": (Loader, "__next__"),
    "forward and backward": (Engine, "forward_backward"),
    "gradient norm": (Engine, "grad_norm"),
    "waiting for a copy": (Recorder, "wait_for_copy"),
    "update": (Engine, "apply"),
    "judging": (Recorder, "judge"),
    "beginning a save": (AsyncSaver, "save"),
    "evaluation": (Recorder, "evaluate"),
}
AFTER_UPDATE = ("judging", "beginning a save", "evaluation")
STOPS = {  # moment: the step in which it is asked for; saves come every 3 steps, evaluations every 4
    "data": 2,
    "forward and backward": 4,
    "gradient norm": 5,
    "waiting for a copy": 7,
    "update": 10,
    "judging": 12,
    "beginning a save": 15,
    "evaluation": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus and store."""
    return tmp_path_factory.mktemp("interrupted")


def run(folder: Path, name: str, asynchronous: bool = True, **schedule: object) -> RunConfig:
    """Batch warm-up ends in step 8; the schedule has its phases at 4 and 18; saves and evaluations in between."""
    return tiny(
        folder,
        run={"name": name, "max_steps": STEPS},
        schedule=schedule or {"kind": "wsd", "warmup": 4, "decay": 6},
        checkpoint={"every_steps": 3, "keep": 3, "asynchronous": asynchronous},
        eval={"every_steps": 4},
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stops_at_any_point_of_a_cycle_change_no_bit(ranks: int, folder: Path) -> None:
    straight, stopped = run(folder, f"straight-{ranks}"), run(folder, f"stopped-{ranks}")
    assert on_ranks(train_asked, ranks, straight) == [ExitStatus.DONE] * ranks
    for moment, step in STOPS.items():
        # One rank is asked, and not always the first; all of them stop, at the end of the step that was under way.
        assert on_ranks(train_asked, ranks, stopped, moment, step, step % ranks) == [ExitStatus.STOPPED] * ranks, moment
        stop = [e for e in read_ledger(RunFolder.of(stopped).ledger_file) if e["event"] == "stop"][-1]
        assert stop["step"] == (step - 1 if moment == "data" else step), moment
    assert on_ranks(train_asked, ranks, stopped) == [ExitStatus.DONE] * ranks
    assert_same_bits(straight, stopped)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_killed_on_the_way_and_begun_again_is_the_same_to_the_bit(ranks: int, folder: Path) -> None:
    schedule: dict[str, Any] = {"kind": "cosine", "warmup": 5}
    straight = run(folder, f"unkilled-{ranks}", **schedule)
    killed = run(folder, f"killed-{ranks}", asynchronous=ranks > 1, **schedule)  # or step 12 is hardly ever committed
    assert on_ranks(train_asked, ranks, straight) == [ExitStatus.DONE] * ranks
    for moment, step in (("update", 8), ("evaluation", 12), ("update", 17)):
        with pytest.raises(AssertionError, match="exit code -9"):
            on_ranks(train_asked, ranks, killed, moment, step, 0, signal.SIGKILL)
    assert on_ranks(train_asked, ranks, killed) == [ExitStatus.DONE] * ranks
    assert_same_bits(straight, killed)


@pytest.mark.slow
def test_two_ranks_then_one_then_three_are_the_run_of_two_to_rounding(folder: Path) -> None:
    straight, moved = run(folder, "staying"), run(folder, "moving")
    assert on_ranks(train_asked, 2, straight) == [ExitStatus.DONE] * 2
    assert on_ranks(train_asked, 2, moved, "update", 7) == [ExitStatus.STOPPED] * 2
    assert on_ranks(train_asked, 1, moved, "update", 16) == [ExitStatus.STOPPED]
    assert on_ranks(train_asked, 3, moved) == [ExitStatus.DONE] * 3
    for mine, other in zip(recorded(moved), recorded(straight), strict=True):
        assert mine["step"] == other["step"]
        if mine["event"] == "step":
            assert mine["learning_rate"] == other["learning_rate"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=2e-6)
            assert mine["target_count"] == other["target_count"]


def test_what_is_recorded_differs_when_the_weights_do(folder: Path) -> None:
    """The comparison above can fail: another seed is another run."""
    one = run(folder, "one-seed")
    other = one.model_copy(update={"run": one.run.model_copy(update={"name": "other-seed", "seed": 8})})
    for config in (one, other):
        on_ranks(train_asked, 1, config)
    with pytest.raises(AssertionError):
        assert_same_bits(one, other)


def train_asked(
    config: RunConfig, moment: str = "", step: int = 0, rank: int = 0, number: signal.Signals = signal.SIGUSR1
) -> int:
    """One rank of the run; rank `rank` gets a signal at the `moment` of the cycle of `step`."""
    if moment and int(os.environ["RANK"]) == rank:
        owner, name = MOMENTS[moment]
        reached = step if moment in AFTER_UPDATE else step - 1
        method, done = getattr(owner, name), steps_done()

        def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if done[-1] == reached:
                os.kill(os.getpid(), number)
            return method(self, *args, **kwargs)

        setattr(owner, name, asked)
    return train_rank(config)


def steps_done() -> list[int]:
    """A list whose last entry is the number of steps done, while the run goes on."""
    done, begin, alive = [0], Console.start, SupervisorLink.heartbeat

    def begins(self: Console, step: int) -> None:
        done.append(step)
        begin(self, step)

    def beats(self: SupervisorLink, step: int, **kwargs: bool) -> None:
        done.append(max(step, done[-1]))
        alive(self, step, **kwargs)

    Console.start, SupervisorLink.heartbeat = begins, beats  # type: ignore[method-assign]
    return done


def assert_same_bits(one: RunConfig, other: RunConfig) -> None:
    """Weights, optimizer, counters and the ledger without its clocks."""
    newest = [checkpoints(RunFolder.of(config).checkpoints)[-1] for config in (one, other)]
    assert newest[0].name == newest[1].name
    tensors, others = (dict(whole_tensors(path, "")) for path in newest)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert recorded(one) == recorded(other)


def recorded(config: RunConfig) -> list[dict[str, Any]]:
    """Steps and evaluations as they count."""
    events = current(read_ledger(RunFolder.of(config).ledger_file))
    return [{k: v for k, v in e.items() if k not in CLOCKS} for e in events if e["event"] in ("step", "eval")]
