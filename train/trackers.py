"""Optional trackers that get the ledger's numbers: wandb (online or offline) and TensorBoard."""

import importlib.util
from collections.abc import Callable
from functools import partial
from queue import Full, Queue
from threading import Thread
from typing import Any, NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.ledger import STEP, lines_from_end, parse_event
from minka.plan.read_file import first_line
from minka.plan.run_folder import RunFolder

WAITING = 10_000  # records that a tracker may be behind
CLOSE_SECONDS = 60.0  # for a tracker to write, or to upload, what waits when the run ends


class Sink(NamedTuple):
    """An open tracker: receives numbers by name and the step that they belong to, and is closed."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


class Tracker:
    """Gives numbers to a sink in a thread, so that what it raises, and the time that it takes, cost the run nothing."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name, self.failure = name, ""  # the first reason why numbers are missing
        self._queue: Queue[tuple[dict[str, float], int] | None] = Queue(WAITING)
        self._thread = Thread(target=self._work, args=(open_sink,), name=name, daemon=True)
        self._thread.start()

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Hand numbers over. Never waits, never raises."""
        self._put((numbers, step))

    def close(self) -> None:
        """Wait until all numbers have arrived, but not for long."""
        self._put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self.failure = self.failure or f"it has not ended within {CLOSE_SECONDS:g} s"

    def _put(self, item: tuple[dict[str, float], int] | None) -> None:
        try:
            if self._thread.is_alive():
                self._queue.put_nowait(item)
        except Full:
            self.failure = self.failure or f"it is {WAITING:,} records behind; further ones are left out"

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        try:
            sink = open_sink()
            while item := self._queue.get():
                sink.log(*item)
            sink.close()
        except BaseException as error:
            self.failure = self.failure or f"{type(error).__name__}: {first_line(error)}"


def check_trackers(config: RunConfig) -> None:
    """Raise UserError when a tracker of the run is not installed. Imports no tracker."""
    wanted = {"wandb": config.tracking.wandb != "off", "tensorboard": config.tracking.tensorboard}
    for package in wanted:
        if wanted[package] and importlib.util.find_spec(package) is None:
            remedy = f"pip install 'minka[{package}]', or drop the setting: the ledger is always written"
            raise UserError(f"{package} is not installed", where=f"tracking.{package}", remedy=remedy)


def start_trackers(config: RunConfig, folder: RunFolder, step: int) -> list[Tracker]:
    """Start the trackers of the run, which is at `step`."""
    trackers = []
    if config.tracking.wandb != "off":
        trackers.append(Tracker("wandb", partial(_open_wandb, config, folder)))
    if config.tracking.tensorboard:
        trackers.append(Tracker("tensorboard", partial(_open_tensorboard, folder, step)))
    return trackers


def _open_wandb(config: RunConfig, folder: RunFolder) -> Sink:
    """Open wandb. A resumed run continues the same page; one that restarts at step 0 gets a new one.

    The step is one of the numbers: wandb's own counter cannot go back, and the numbers of a run that is resumed from a
    checkpoint before its end would be dropped.
    """
    import wandb

    with folder.ledger_file.open("rb") as ledger:
        events = [parse_event(line) for _, line in lines_from_end(ledger, skip=STEP)]
    restarts = sum(1 for event in events if event and event["event"] == "restart")
    run = wandb.init(
        project=config.tracking.wandb_project,
        name=config.run.name,
        id=(folder.run_id() or config.run.name) + (f"-{restarts}" if restarts else ""),
        resume="allow",
        mode="online" if config.tracking.wandb == "online" else "offline",
        dir=str(folder.path),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")
    return Sink(lambda numbers, step: run.log({**numbers, "step": step}), run.finish)


def _open_tensorboard(folder: RunFolder, step: int) -> Sink:
    """Open TensorBoard. Points beyond `step`, which a run has written that is now resumed there, are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder.tensorboard), purge_step=step + 1)

    def log(numbers: dict[str, float], at: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, at)

    return Sink(log, writer.close)
