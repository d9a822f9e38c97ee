"""`make gpu-check`: what there is to see on a GPU, in two calls of at most nine minutes that need no network.

`first`: the demo as a command, on one rank and on two, the tests that need a GPU, the bench of the kernels.
`training`: steps of real sizes. Every step has its own limit, and the steps after one that fails run all the same.
Without a GPU only --tiny runs, which shows that everything starts; the tests are then skipped, and the table says so.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from minka.benchmarks.options import require_gpu
from minka.plan.cli import print_table

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 9 * 60
LAST = {"training": 150, "kernels": 60}  # steps that take --seconds, and what the last thing that they begin may need


class Step(NamedTuple):
    """A command, the seconds it may take, and what its environment has in addition. tests: where pytest counts them."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = {}
    tests: Path | None = None  # a JUnit file


class Ending(NamedTuple):
    """How a step ended, in words, and after how many seconds."""

    passed: bool
    how: str
    seconds: float


def steps(call: str, folder: Path, *, tiny: bool, write: bool) -> list[Step]:
    """The steps of a call; `folder` takes the runs of the demo."""
    python = (sys.executable, "-m")
    small = ("--tiny",) if tiny else ()
    if call == "training":
        few = ("--tiny", "--steps", "2") if tiny else ()
        return [Step("training", (*python, "minka.benchmarks.gpu_training", *few), SECONDS - 20)]
    short = ("run.max_steps=4", "schedule.warmup=1", "eval.max_documents=2", "data.max_bytes=200000")
    train = (*python, "minka", "train", "demo", f"run.folder={folder / 'runs'}", f"data.store={folder / 'store'}")
    demo = (*train, *(short if tiny else ()))
    two = (*train, "--ranks", "2", "run.name=two", *(short if tiny else ("run.max_steps=60",)))
    # Two ranks need two GPUs; without them they train on the CPU.
    hidden = {} if torch.cuda.device_count() > 1 else {"CUDA_VISIBLE_DEVICES": ""}
    files = map(str, sorted((ROOT / "tests").rglob("test_gpu*.py")))
    counts = folder / "tests.xml"
    tests = (*python, "pytest", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={counts}", *files)
    bench = (*python, "minka.benchmarks.kernels", *(small or (("--write",) if write else ())))
    return [
        Step("demo", demo, 120),
        Step("demo on two ranks", two, 120, hidden),
        Step("tests", tests, 200, tests=counts),
        Step("kernels", bench, 280),
    ]


def main() -> int:
    """Run the steps of a call; return 1 where one fails or takes too long."""
    parser = argparse.ArgumentParser(description="What there is to see on a GPU, in two calls.")
    parser.add_argument("call", choices=["first", "training"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see on any machine that everything runs")
    parser.add_argument("--keep", action="store_true", help="do not write kernels/choices.toml and docs/kernels.md")
    options = parser.parse_args()
    require_gpu(parser, tiny=options.tiny)
    write, began, rows = torch.cuda.is_available() and not options.keep, time.monotonic(), list[tuple[str, Ending]]()
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(options.call, Path(folder), tiny=options.tiny, write=write):
            limit = min(step.seconds, SECONDS - (time.monotonic() - began))
            asked = step if options.tiny else told(step, limit)
            rows.append((step.name, run(asked, limit, skips=options.tiny)))
    print_table([(name, end.how, f"{end.seconds:.0f}") for name, end in rows], ["step", "", "seconds"])
    return 0 if all(end.passed for _, end in rows) else 1


def told(step: Step, limit: float) -> Step:
    """The step, told when to begin nothing more, where it can be: what it has measured is kept."""
    if step.name not in LAST:
        return step
    return step._replace(command=(*step.command, "--seconds", str(max(0, int(limit - LAST[step.name])))))


def run(step: Step, limit: float, *, skips: bool) -> Ending:
    """How a step ended. Its output goes where ours does. skips: whether a step passes whose tests were all skipped."""
    print(f"=== {step.name}: {' '.join(step.command)}", flush=True)
    began = time.monotonic()
    if limit <= 0:
        return Ending(False, "no time was left", 0.0)
    source = os.pathsep.join(path for path in (str(ROOT / ".ns"), os.environ.get("PYTHONPATH", "")) if path)
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1", **step.environment}
    try:
        done = subprocess.run(step.command, env=environment, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Ending(False, f"took more than {limit:.0f} s", time.monotonic() - began)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        return Ending(False, f"exit status {done.returncode}", seconds)
    if step.tests is None:
        return Ending(True, "passed", seconds)
    ran, skipped = counted_tests(step.tests)
    how = ", ".join(f"{count} {word}" for count, word in ((ran, "passed"), (skipped, "skipped")) if count)
    return Ending(ran > 0 or skips, how if ran or skips else f"failed: {how}", seconds)


def counted_tests(file: Path) -> tuple[int, int]:
    """How many tests of a JUnit file ran, and how many were skipped."""
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    every, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
    return every - skipped, skipped


if __name__ == "__main__":
    sys.exit(main())
