"""Shared by all tests: seeds, thirds of the slow tests, and the sizes printed after each run."""

import hashlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from house import sizes

ROOT = Path(__file__).resolve().parent.parent
THIRDS = 3

settings.register_profile("minka", deadline=None, derandomize=True, print_blob=True)  # same cases on every machine
settings.load_profile("minka")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--third=K` keeps those slow tests whose name hashes to K: what .ci/run runs on one commit."""
    parser.addoption("--third", type=int, choices=range(THIRDS), help="of the slow tests, run this third only")


def pytest_configure(config: pytest.Config) -> None:
    """The same surroundings everywhere. Only `-m gpu` sees GPUs: all other tests, and what they start, use the CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A run keeps ignoring what it was started to ignore, and tests may be started in the background of a script.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the other two thirds."""
    third = config.getoption("--third")
    if third is None:
        return
    out = [item for item in items if item.get_closest_marker("slow") and third_of(item.nodeid) != third]
    items[:] = [item for item in items if item not in set(out)]
    config.hook.pytest_deselected(items=out)


def third_of(test: str) -> int:
    """Which third a test belongs to; follows from its name alone."""
    return int(hashlib.sha256(test.encode()).hexdigest()[:8], 16) % THIRDS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sizes are a budget: say after each run where it is spent."""
    found = sizes(ROOT)
    total = sum(found.folders.values())
    folders = ", ".join(f"{folder} {n:,}" for folder, n in found.folders.items() if n)
    terminalreporter.write_line(f"house: {found.product:,} product lines, {total:,} with tests ({folders})")
    for kind, long in (("files over 300 lines", found.long_files), ("functions over 60 lines", found.long_functions)):
        if long:
            terminalreporter.write_line(f"house: {kind}: {', '.join(long)}")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers whatever ran before; torch and numpy only where a test has imported them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _started() -> Iterator[None]:
    """No process outlives the test that started it."""
    yield
    if "commands" in sys.modules:
        sys.modules["commands"].end_started()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def source_environment() -> dict[str, str]:
    """Environment of a child that runs minka from the source tree, installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT / ".ns")}
