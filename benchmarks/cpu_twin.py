"""Step times of several gloo ranks on this machine, predicted from runs of one rank, and measured.

    python -m minka.benchmarks.cpu_twin             the cluster, one rank, then 2, 4 and 8 ranks in turn
    python -m minka.benchmarks.cpu_twin --layouts --machine FILE
                                                    ten small cases: is the predicted winner among the best two?

Both are ratios to one rank in the same minutes: a shared cluster changes its speed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minka.plan.calibrate import calibrate, errors
from minka.plan.calibrate_runs import measured, read_run
from minka.plan.cli import print_table
from minka.plan.cluster import Cluster, cluster_toml, read_cluster
from minka.plan.errors import UserError
from minka.plan.step_time import step_time
from minka.train.measure_machine import measure_machine

SECONDS = 300.0
STEPS = 18  # of a run: a first reading, which is left out, and five more
SMALL = "model.layers=4 model.d_model=192 model.heads=4 model.kv_heads=4 model.head_dim=48 model.d_ff=576".split()
SMALL += [
    "model.vocab=2048",
    "model.tied=false",
    "data.seq_len=128",
    "data.batch_tokens=2048",
    "data.max_bytes=2000000",
]
QUIET = f"run.max_steps={STEPS} schedule.warmup=1 eval.every_steps=0 eval.max_documents=1 eval.sample_tokens=1".split()
QUIET += "tracking.log_every=3 tracking.detail_every=0 checkpoint.every_steps=0 checkpoint.export=false".split()
ONE_RANK = (
    ["layout.micro_batch=16"],
    ["layout.micro_batch=4"],
    ["layout.micro_batch=8", "model.d_ff=1152"],
    ["layout.micro_batch=8", "model.layers=8"],
    ["layout.micro_batch=8", "layout.recompute=block"],
    ["layout.micro_batch=4", "model.d_model=128", "model.d_ff=384", "model.head_dim=32"],
)
LAYOUTS = (
    (2, ["layout.shard=2", "layout.micro_batch=8"]),
    (2, ["layout.tensor=2", "layout.micro_batch=8"]),
    (2, ["layout.pipeline=2", "layout.micro_batch=4"]),
    (4, ["layout.shard=2", "layout.tensor=2", "layout.micro_batch=4"]),
    (4, ["layout.replicate=2", "layout.shard=2", "layout.micro_batch=4"]),
    (8, ["layout.shard=8", "layout.micro_batch=2"]),
)


SHORT = ["run.max_steps=9"]
SMALLER = ["model.d_model=128", "model.d_ff=384", "model.head_dim=32"]
CASES = (
    *((ranks, case) for ranks in (2, 4) for case in ([], ["model.layers=6"], ["model.d_ff=1152"], SMALLER)),
    (2, ["data.seq_len=256"]),
    (4, ["data.seq_len=256"]),
)
WAYS = {
    2: (
        ["layout.shard=2", "layout.micro_batch=4"],
        ["layout.tensor=2", "layout.micro_batch=8"],
        ["layout.pipeline=2", "layout.micro_batch=2"],
        ["layout.context=2", "layout.micro_batch=8"],
    ),
    4: (
        ["layout.shard=4", "layout.micro_batch=2"],
        ["layout.shard=2", "layout.tensor=2", "layout.micro_batch=4"],
        ["layout.pipeline=2", "layout.shard=2", "layout.micro_batch=1"],
        ["layout.tensor=4", "layout.micro_batch=8"],
    ),
}


class Twin(NamedTuple):
    """A run that was measured, and what was predicted for it."""

    ranks: int
    settings: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """How much longer than measured it was predicted, as a share."""
        return self.predicted / self.measured - 1

    def shown(self) -> list[str]:
        """Return the times and the error as text."""
        return [f"{self.measured:.3f} s", f"{self.predicted:.3f} s", f"{self.error:+.1%}"]


class Sweep(NamedTuple):
    """Where the predicted winner of a case came in."""

    ranks: int
    case: str
    winner: list[str]
    place: int  # 1: the fastest
    regret: float  # how much slower than the fastest, as a share

    def shown(self) -> list[str]:
        """Return it as text."""
        return [f"{self.ranks}", self.case, " ".join(self.winner), f"{self.place}", f"{self.regret:+.1%}"]


def run(folder: Path, name: str, ranks: int, settings: Sequence[str]) -> str:
    """Train, and return the run's folder. Raises UserError where it fails."""
    words = [*SMALL, *QUIET, *settings, f"run.name={name}", f"run.folder={folder}", f"data.store={folder / 'store'}"]
    command = [sys.executable, "-m", "minka", "train", "demo", *words, "--ranks", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        why = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"the run {name} ended with status {done.returncode}", where="cpu_twin", why=" ".join(why))
    return str(folder / name)


def one_rank(folder: Path, cluster: Cluster) -> Cluster:
    """Return the cluster with rates that runs of one rank have."""
    alone = [read_run(run(folder, f"one-{number}", 1, words)) for number, words in enumerate(ONE_RANK)]
    steps = [measured(one, cluster) for one in alone]
    fitted = calibrate(cluster, steps, "one rank")
    say(f"one rank: {', '.join(f'{error:+.1%}' for error in errors(fitted, steps))} with {fitted.rates}")
    return fitted


def twins(folder: Path, cluster: Cluster, layouts: Sequence[tuple[int, list[str]]]) -> list[Twin]:
    """Measure each layout next to one rank, and scale by how far that is from what it is predicted."""
    found = []
    for number, (ranks, words) in enumerate(layouts):
        there = read_run(run(folder, f"many-{number}", ranks, words))
        alone = read_run(run(folder, f"alone-{number}", 1, ONE_RANK[0]))
        drift = 1 + errors(cluster, [measured(alone, cluster)])[0]
        predicted = step_time(measured(there, cluster).job, cluster).seconds
        found.append(Twin(ranks, " ".join(words), there.seconds * drift, predicted))
        say(f"{ranks} ranks, {found[-1].settings}: {', '.join(found[-1].shown())}")
    return found


def sweep(folder: Path, cluster: Cluster) -> list[Sweep]:
    """Measure every way of every case, and say where the predicted winner comes in."""
    found = []
    for number, (ranks, case) in enumerate(CASES):
        times, predicted = [], []
        for way, words in enumerate(WAYS[ranks]):
            settings = [*SHORT, *case, *words]
            there = read_run(run(folder, f"case-{number}-{way}", ranks, settings))
            times.append(there.seconds)
            predicted.append(step_time(measured(there, cluster).job, cluster).seconds)
        winner = predicted.index(min(predicted))
        place = sorted(times).index(times[winner]) + 1
        found.append(Sweep(ranks, " ".join(case), WAYS[ranks][winner], place, times[winner] / min(times) - 1))
        say(f"{found[-1]}: {[round(one, 3) for one in times]}, {[round(one, 3) for one in predicted]}")
    return found


def main() -> int:
    """Print the table. Return 1 where a time is more than 15 % off, or a predicted winner is not among the best two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--machine", type=Path, help="what --save or `minka doctor --machine` wrote; default: measured now"
    )
    parser.add_argument("--save", type=Path, help="write the machine with its fitted rates")
    parser.add_argument("--layouts", action="store_true", help="measure ten small cases under four layouts each")
    options = parser.parse_args()
    cluster = read_cluster(options.machine) if options.machine else measure_machine()
    say(f"{cluster}")
    with tempfile.TemporaryDirectory(prefix="minka-twin-") as folder:
        if options.layouts:
            sweeps = sweep(Path(folder), cluster)
            print_table([one.shown() for one in sweeps], ["ranks", "case", "predicted winner", "place", "slower"])
            return int(max(one.place for one in sweeps) > 2)
        fitted = one_rank(Path(folder), cluster)
        if options.save:
            options.save.write_text(cluster_toml(fitted), encoding="utf-8")
        found = twins(Path(folder), fitted, LAYOUTS)
    rows = [[f"{one.ranks}", one.settings, *one.shown()] for one in found]
    print_table(rows, ["ranks", "layout", "measured", "predicted", "error"])
    off = [abs(one.error) for one in found]
    print(f"mean error {statistics.mean(off):.1%}, largest {max(off):.1%}")
    return int(max(off) > 0.15)


def say(line: str) -> None:
    """Print progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
