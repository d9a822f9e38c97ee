"""Trackers: their curves have each step once, whatever became of the run; nothing that they do ends it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from minka.launch.supervisor import Job
from minka.plan.config import RunConfig
from minka.plan.ledger import read_ledger
from minka.plan.run_folder import RunFolder
from minka.train import trackers
from minka.train.metrics import StepRecord, interval_numbers
from minka.train.state import State
from minka.train.trackers import Sink, Tracker
from minka.train.worker import work
from ranks import on_ranks
from tiny import tiny, train_rank


def restart_rank(config: RunConfig) -> int:
    """A rank of a run that is started with --from-scratch."""
    return work(Job(config=config, threads=1, from_scratch=True))


@pytest.mark.slow
def test_a_resumed_curve_has_every_step_once_and_one_from_scratch_is_new(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        run={"max_steps": 12},
        checkpoint={"every_steps": 4, "keep": 9},
        tracking={"wandb": "offline", "tensorboard": True, "log_every": 2},
    )
    folder = RunFolder.of(config)
    on_ranks(train_rank, 1, config)
    shutil.rmtree(folder.checkpoints / "step-00000012")  # as if it had been killed after step 8
    on_ranks(train_rank, 1, config.model_copy(update={"run": config.run.model_copy(update={"max_steps": 16})}))
    steps = [e for e in read_ledger(folder.ledger_file) if e["event"] == "step"]
    assert [e["step"] for e in steps] == [*range(1, 13), *range(9, 17)]
    points = curve(folder.tensorboard, "loss")
    assert sorted(points) == [1, 2, 4, 6, 8, 9, 10, 12, 14, 16]  # the first of each session, too
    by_step = {e["step"]: e for e in steps}
    one, two = by_step[15], by_step[16]
    targets = one["target_count"] + two["target_count"]
    mean = (one["loss"] * one["target_count"] + two["loss"] * two["target_count"]) / targets
    assert points[16] == pytest.approx([mean])
    assert curve(folder.tensorboard, "tokens")[16] == [two["tokens"]]
    assert curve(folder.tensorboard, "grad_norm")[16] == pytest.approx([(one["grad_norm"] + two["grad_norm"]) / 2])
    for name in ("learning_rate", "tokens_per_second", "memory_bytes", "z_loss", "seconds/compute"):
        assert set(curve(folder.tensorboard, name)) == set(points), name
    first, second = wandb_runs(folder)
    assert (first["id"], second["id"]) == (folder.run_id(), folder.run_id())
    assert [row["step"] for row in second["rows"] if "loss" in row] == [9, 10, 12, 14, 16]
    assert second["rows"][-2]["loss"] == pytest.approx(mean)
    assert second["step_metrics"] == {"*": "step"}
    on_ranks(restart_rank, 1, config)
    assert sorted(curve(folder.tensorboard, "loss")) == [1, 2, 4, 6, 8, 10, 12]
    assert sorted(curve(folder.logs / "tensorboard.old-1", "loss")) == sorted(points)
    assert wandb_runs(folder)[-1]["id"] == f"{folder.run_id()}-1"


def curve(folder: Path, name: str) -> dict[int, list[float]]:
    """What TensorBoard shows of a number: values by step."""
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    found: dict[int, list[float]] = {}
    for event in events.Scalars(name):
        found.setdefault(event.step, []).append(event.value)
    assert all(len(values) == 1 for values in found.values()), found
    return found


def wandb_runs(folder: RunFolder) -> list[dict[str, Any]]:
    """The offline wandb runs of a folder, in their order: id, rows of the history, and the metrics defined."""
    found = []
    for file in sorted(
        (folder.path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime
    ):
        run: dict[str, Any] = {"id": "", "rows": [], "step_metrics": {}}
        for data in leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            run["id"] = record.run.run_id or run["id"]
            if record.metric.step_metric:
                run["step_metrics"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
            if record.history.item:
                items = record.history.item
                run["rows"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        found.append(run)
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log (doc/log_format.md there), which wandb writes after 7 bytes of its own."""
    at, record, block, header = 7, b"", 2**15, 7
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, last part
            yield record
            record = b""


def raises(*given: object) -> NoReturn:
    raise SystemExit("no more")


@pytest.mark.parametrize(
    "open_sink",
    [raises, lambda: Sink(raises, print), lambda: Sink(lambda numbers, step: None, raises)],
    ids=["opening", "logging", "closing"],
)
def test_what_a_tracker_raises_is_a_reason_and_nothing_else(open_sink: Callable[[], Sink]) -> None:
    tracker = Tracker("any", open_sink)
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert tracker.failure == "SystemExit: no more"


def test_a_tracker_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WAITING", 5), ("CLOSE_SECONDS", 0.1)):
        monkeypatch.setattr(trackers, name, value)
    ended = Event()
    tracker = Tracker("any", lambda: Sink(lambda numbers, step: ended.wait(60), print))
    for step in range(100):
        tracker.log({"loss": 1.0}, step)
    assert "5 records behind" in tracker.failure
    tracker.close()
    ended.set()


def test_a_point_is_the_mean_of_the_steps_since_the_last_without_refused_ones() -> None:
    seconds = dict.fromkeys(("data", "compute", "save", "eval"), 0.5)
    steps = [
        StepRecord(State(step=1, tokens=10), 2.0, 0.1, 1.0, 0.1, 10, seconds),
        StepRecord(State(step=2, tokens=40), 4.0, 0.3, 3.0, 0.2, 30, seconds),
        StepRecord(State(step=3, tokens=50), float("nan"), 0.0, float("inf"), 0.3, 10, seconds),
    ]
    numbers = interval_numbers(steps)
    assert numbers == pytest.approx(
        {"loss": 3.5, "z_loss": 0.25, "grad_norm": 2.0, "learning_rate": 0.3, "tokens": 50}
        | {f"seconds/{part}": 0.5 for part in seconds}
    )
    assert interval_numbers(steps[2:])["loss"] != interval_numbers(steps[2:])["loss"]  # all were refused: NaN
