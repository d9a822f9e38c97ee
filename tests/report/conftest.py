"""Two real runs that the report's tests share, and a browser for those that open a page."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from browser import browser
from minka.plan.run_folder import RunFolder
from ranks import on_ranks
from tiny import tiny, train_rank


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """Two runs of the same data at two learning rates, trained by the real loop."""
    place, folders = tmp_path_factory.mktemp("trained"), []
    for name, rate in (("one", 3e-3), ("two", 1e-3)):
        config = tiny(
            place,
            run={"name": name},
            optimizer={"learning_rate": rate},
            eval={"every_steps": 8, "prompts": ["the "], "sample_tokens": 4},
            checkpoint={"every_steps": 8},
        )
        on_ranks(train_rank, 1, config)
        folders.append(RunFolder.of(config))
    return folders[0], folders[1]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all; every page has a context of its own."""
    with browser() as running:
        yield running
