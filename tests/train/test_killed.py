"""A run that is killed at any moment of its life: the same command continues it, to the bits of one that never was."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from commands import SOURCE, start, written
from killed import kill_at
from minka.checkpoint.catalogue import find_checkpoint
from minka.checkpoint.restore import whole_tensors
from minka.plan.config import RunConfig
from minka.plan.run_folder import RunFolder
from ranks import FORKS
from tiny import corpus, tiny, train_rank

KILLS, AT_ONCE = 100, 4  # in all, and in one test
NEVER = 10**9
MANY = 50  # starts, of which some end before their moment comes
STAGES = {  # of a life, each by a word that its notes contain; the first one counts
    "exporting": "/.export.",
    "training a tokenizer": "/tokenizer",
    "preparing data": "/.store.",
    "saving": "/checkpoints",
    "evaluating": "/evals",
    "training": "/ledger",
    "ending": "exit_reason",
    "making the folder": "/runs",
}


class Undisturbed:
    """What a run is to come to, and which of its changes of the disk belong to which stage."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.corpus, self.ranks = corpus(folder / "corpus"), ranks
        began = time.monotonic()
        log = folder / "notes"
        assert trained(run(folder / "whole", self.corpus), ranks, NEVER, log) == 0
        self.seconds = time.monotonic() - began
        self.result = result(run(folder / "whole", self.corpus))
        self.moments: dict[str, list[int]] = {stage: [] for stage in STAGES}
        self.writes: dict[str, list[int]] = {stage: [] for stage in STAGES}  # those that a full disk refuses
        for number, note in enumerate(log.read_text().splitlines(), 1):
            self.moments[stage_of(note)].append(number)
            if note.startswith(("open", "os.mkdir")):
                self.writes[stage_of(note)].append(number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Undisturbed]:
    return {ranks: Undisturbed(tmp_path_factory.mktemp(f"ranks-{ranks}"), ranks) for ranks in (1, 2)}


def run(folder: Path, documents: Path) -> RunConfig:
    """Eight steps: four saves, two evaluations, an export."""
    return tiny(
        folder,
        run={"max_steps": 8},
        model={"vocab": 300},
        data={"tokenizer": "bpe", "paths": [str(documents)]},
        checkpoint={"every_steps": 2, "export": True},
        eval={"every_steps": 4},
    )


def stage_of(note: str) -> str:
    return next((stage for stage, word in STAGES.items() if word in note), "making the folder")


def result(config: RunConfig) -> dict[str, Any]:
    """The bits of the export, and of weights and optimizer in the last checkpoint. Torch seeds a process at random."""
    folder = RunFolder.of(config)
    tensors = whole_tensors(find_checkpoint(folder.checkpoints), "")
    found = {name: tensor.numpy().tobytes() for name, tensor in tensors if not name.startswith("rng.")}
    return found | {"export": (folder.export / "model.safetensors").read_bytes()}


def leftovers(folder: Path) -> list[str]:
    words = (".partial", ".saving", ".replaced", ".leaving", ".deleting", ".damaged")
    return [str(path) for path in folder.rglob("*") if any(word in path.name for word in words)]


def rank_that_is_killed(config: RunConfig, place: dict[str, str], moment: int, log: Path, full: bool) -> None:
    os.environ.update(place)
    if moment:
        kill_at(moment, Path(config.run.folder).parent, log, full=full)
    os._exit(train_rank(config))


def trained(
    config: RunConfig, ranks: int, moment: int, log: Path, seconds: float = 300.0, *, full: bool = False
) -> int:
    """Train on forked ranks. The status; -SIGKILL once one was killed at `moment`, or all were after `seconds`."""
    Path(config.run.folder).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as shared:
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MINKA_STORE": f"{shared}/x"}
            arguments = (config, place, moment, log, full)
            processes.append(FORKS.Process(target=rank_that_is_killed, args=arguments, daemon=True))
            processes[-1].start()
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.is_alive() for process in processes):
            if -signal.SIGKILL in [process.exitcode for process in processes]:
                break
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode or 0 for process in processes]
        return -signal.SIGKILL if -signal.SIGKILL in codes else max(codes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(KILLS // AT_ONCE))
def test_a_run_killed_at_any_moment_comes_to_the_same_bits(
    part: int, undisturbed: dict[int, Undisturbed], tmp_path: Path
) -> None:
    for kill in range(part * AT_ONCE, (part + 1) * AT_ONCE):
        dice, whole = random.Random(kill), undisturbed[2 if kill % 5 == 0 else 1]
        config = run(tmp_path / str(kill) / "project", whole.corpus)
        stages = [stage for stage in STAGES if whole.moments[stage]]
        stage, log = stages[kill % len(stages)], tmp_path / str(kill) / "notes"
        if kill % 10 == 9:
            said = "after a while"
            seconds = dice.uniform(0.1, whole.seconds)
            while not (status := trained(config, whole.ranks, 0, log, seconds)):  # it had ended before
                shutil.rmtree(tmp_path / str(kill))
                seconds /= 2
        else:
            said, moment = stage, dice.choice(whole.moments[stage])
            status = trained(config, whole.ranks, moment, log)
            if log.read_text().count("\n") >= moment:
                said = stage_of(log.read_text().splitlines()[moment - 1])
        twice = kill % 3 == 0 and status == -signal.SIGKILL
        if twice:
            log.write_text("")
            again = trained(config, whole.ranks, dice.randint(1, MANY), log)
            twice = again == -signal.SIGKILL
        print(f"kill {kill}: {said}, {whole.ranks} ranks, status {status}{', and again' if twice else ''}")
        assert status == -signal.SIGKILL
        assert trained(config, whole.ranks, NEVER, log) == 0
        assert result(config) == whole.result, f"kill {kill}: {said}"
        assert leftovers(tmp_path / str(kill)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_from_any_moment_on_leaves_what_the_same_command_continues(
    stage: str, undisturbed: dict[int, Undisturbed], tmp_path: Path
) -> None:
    whole, config = undisturbed[1], run(tmp_path / "project", undisturbed[1].corpus)
    dice = random.Random(stage)
    for _ in range(2):
        status = trained(config, 1, dice.choice(whole.writes[stage]), tmp_path / "notes", full=True)
        print(f"full disk: {stage}, status {status}")
        (tmp_path / "notes").unlink()
        assert trained(config, 1, NEVER, tmp_path / "notes") == 0
        assert result(config) == whole.result
        assert leftovers(tmp_path) == []
        shutil.rmtree(tmp_path / "project")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill", range(8))
def test_a_command_killed_with_all_its_processes_continues_to_the_same_bits(
    kill: int, undisturbed: dict[int, Undisturbed], tmp_path: Path
) -> None:
    whole, config = undisturbed[2], run(tmp_path / "project", undisturbed[2].corpus)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import killed\nkilled.kill_command()\n")
    tests, log = Path(__file__).resolve().parent.parent, tmp_path / "notes"
    Path(config.run.folder).parent.mkdir(parents=True, exist_ok=True)
    file = written(config)
    stage = [*STAGES][kill]
    moment = random.Random(kill).choice(whole.moments[stage])
    more = {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "site", tests, SOURCE))),
        "MINKA_TEST_KILL": os.pathsep.join((str(moment), str(tmp_path / "project"), str(log))),
    }
    killed = start("minka", "train", str(file), "--ranks", "2", **more)
    killed.communicate(timeout=300)
    said = stage_of(log.read_text().splitlines()[moment - 1])
    print(f"command {kill}: {said}, status {killed.returncode}")
    assert killed.returncode == -signal.SIGKILL
    again = start("minka", "train", str(file), "--ranks", "2")
    out, error = again.communicate(timeout=300)
    assert again.returncode == 0, out + error
    assert result(config) == whole.result
    assert leftovers(tmp_path) == []
