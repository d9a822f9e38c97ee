"""Optional trackers that get the ledger's numbers: wandb (online or offline) and TensorBoard."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

from minka.plan.config import RunConfig
from minka.plan.errors import UserError
from minka.plan.run_folder import RunFolder


class Tracker(Protocol):
    """Receives numbers by name, and the step that they belong to."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def check_trackers(config: RunConfig) -> None:
    """Raise UserError when a tracker of the run is not installed. Imports no tracker."""
    wanted = {"wandb": config.tracking.wandb != "off", "tensorboard": config.tracking.tensorboard}
    for package in wanted:
        if wanted[package] and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed",
                where=f"tracking.{package}",
                remedy=f"pip install 'minka[{package}]', or drop the setting: the ledger is always written",
            )


def open_trackers(config: RunConfig, folder: RunFolder) -> list[Tracker]:
    """Open the trackers of the run. Raises UserError when one is not installed."""
    check_trackers(config)
    trackers: list[Tracker] = []
    if config.tracking.wandb != "off":
        trackers.append(Wandb(config, folder))
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(folder))
    return trackers


class Wandb:
    """Weights & Biases. The run's name is its id, so a resumed run continues the same page."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.tracking.wandb_project,
            name=config.run.name,
            id=config.run.name,
            resume="allow",
            mode="online" if config.tracking.wandb == "online" else "offline",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in logs/tensorboard."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder.logs / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
