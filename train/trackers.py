"""Optional trackers that get the ledger's numbers: wandb (online or offline) and TensorBoard."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.run_folder import RunFolder


class Tracker(NamedTuple):
    """Receives numbers by name, and the step that they belong to."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def check_trackers(config: RunConfig) -> None:
    """Raise UserError when a tracker of the run is not installed. Imports no tracker."""
    wanted = {"wandb": config.tracking.wandb != "off", "tensorboard": config.tracking.tensorboard}
    for package in wanted:
        if wanted[package] and importlib.util.find_spec(package) is None:
            remedy = f"pip install 'minka[{package}]', or drop the setting: the ledger is always written"
            raise UserError(f"{package} is not installed", where=f"tracking.{package}", remedy=remedy)


def open_trackers(config: RunConfig, folder: RunFolder) -> list[Tracker]:
    """Open the trackers of the run. wandb's id is the run's name, so a resumed run continues the same page."""
    trackers = []
    if config.tracking.wandb != "off":
        import wandb

        run = wandb.init(
            project=config.tracking.wandb_project,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            mode=config.tracking.wandb,
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        trackers.append(Tracker(run.log, run.finish))
    if config.tracking.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(log_dir=str(folder.logs / "tensorboard"))

        def log(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        trackers.append(Tracker(log, writer.close))
    return trackers
