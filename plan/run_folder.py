"""The run folder: what is on disk of a run, who may write there, and whether it is the run that is meant."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from minka.plan.atomic import write_json, write_text, writing
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import parse, read_ledger
from minka.plan.load_config import dump_toml, from_json, load_run
from minka.plan.resume_rules import Changes, changes, check_resume

LINEAGE_FORMAT = 1


class History(NamedTuple):
    """What a ledger says of a run's starts and saves since it last began again."""

    starts: int
    saves: int
    config: RunConfig | None  # as it was last started; None in a ledger that does not say


class RunFolder:
    """The files of one run; see docs/architecture.md for the list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.toml"
        self.ledger_file = path / "ledger.jsonl"
        self.lineage_file = path / "lineage.json"
        self.topology_file = path / "topology.json"
        self.checkpoints = path / "checkpoints"
        self.evals = path / "evals"
        self.export = path / "export"
        self.logs = path / "logs"
        self.exit_file = path / "exit_reason.json"
        self.stop_file = path / "STOP"

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The folder `config` names; nothing is created."""
        return cls(Path(config.run.folder) / config.run.name)

    def exists(self) -> bool:
        """Whether a run was made here."""
        return self.config_file.is_file()

    def begun(self) -> bool:
        """Whether it has come as far as its first step or checkpoint. Before that, making it again loses nothing."""
        recorded = self.ledger_file.exists() and self.ledger_file.stat().st_size > 0
        return self.exists() and (recorded or any(self.checkpoints.glob("step-*")))

    def config(self) -> RunConfig:
        """The run as its run.toml has it."""
        return load_run(str(self.config_file)).config

    def history(self) -> History:
        """Starts and saves since the run last began again, and the configuration that it was last started with."""
        starts = saves = 0
        config: RunConfig | None = None
        for event in read_ledger(self.ledger_file, with_steps=False):
            match event["event"]:
                case "restart":
                    starts = saves = 0
                case "save":
                    saves += 1
                case "start":
                    starts += 1
                    with suppress(ValidationError):
                        config = from_json(json.dumps(event["config"])) if "config" in event else None
        return History(starts, saves, config)

    def changes(self, config: RunConfig) -> Changes:
        """Where `config` differs from the run as it was last started. A run.toml edited since does not hide it."""
        return changes(self.history().config or self.config(), config)

    def lineage(self) -> list[dict[str, Any]]:
        """The checkpoints that the run came from, nearest first; empty when it began from new weights."""
        if not self.lineage_file.exists():
            return []
        try:
            return list(parse(self.lineage_file.read_bytes())["parents"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot be read: {error}", where=str(self.lineage_file), remedy="mend the file") from None

    def open(self, config: RunConfig, provenance: Mapping[str, object], lineage: Sequence[object] = ()) -> None:
        """Make the folder, or check that the run begun in it may go on as `config` describes it.

        Raises UserError when another run has this name, and when the disk is full or may not be written.
        """
        begun = self.begun()
        if begun:
            check_resume(self.changes(config), config.run.name, str(self.path))
            self.check_data(provenance)
        elif not self.exists() and self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                "this folder is not empty and holds no run.toml",
                where=str(self.path),
                why="a run never writes into somebody else's folder",
                remedy="choose another run.name or run.folder, or move what is there",
            )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            if not begun:
                write_json(self.path / "provenance.json", provenance)
                self.lineage_file.unlink(missing_ok=True)
                if lineage:
                    write_json(self.lineage_file, {"format": LINEAGE_FORMAT, "parents": list(lineage)})
                write_text(self.config_file, dump_toml(config))  # last: with it, the run exists

    def begin(self, config: RunConfig) -> None:
        """Training begins: `config` is the run's from here on, and how it ended before no longer counts."""
        with writing(self.path):
            self.exit_file.unlink(missing_ok=True)
            if self.config_file.read_text(encoding="utf-8") != dump_toml(config):
                write_text(self.config_file, dump_toml(config))

    def check_data(self, provenance: Mapping[str, Any]) -> None:
        """Raises UserError when the run began with a different token store."""
        file = self.path / "provenance.json"
        try:
            began = parse(file.read_bytes()) if file.exists() else {}
            old, new = (p.get("data", {}).get("manifest_sha256") for p in (began, provenance))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"cannot be read: {error}",
                where=str(file),
                why="it says which token store this run began with",
                remedy="mend the file, or give the run a new one (run.name=...)",
            ) from None
        if old != new:
            raise UserError(
                f"the token store is not the one this run began with (hash {str(old)[:8]} then, {str(new)[:8]} now)",
                where=str(provenance.get("data", {}).get("store", self.path)),
                why="the same ids could mean other text, and the run would go on without a word",
                remedy="put the old store back, or give the new data a run of their own (run.name=...)",
            )

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Held by the one process that writes here. Raises UserError while another one does, or where none may."""
        with ExitStack() as stack:
            with writing(self.path):
                file = stack.enter_context((self.path / ".lock").open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        "this run is being trained by another process",
                        where=str(self.path),
                        why="two writers would mix their checkpoints",
                        remedy="wait for it, or stop it (put a file called STOP into the folder)",
                    ) from None
            yield

    def check_may_start(self) -> None:
        """Raises UserError while another process trains the run, or a person's STOP file is there."""
        if self.stop_file.exists():
            raise UserError(
                "a person asked this run to stop: there is a file called STOP",
                where=str(self.stop_file),
                why="starting would save and stop again, for ever",
                remedy="delete the file to let the run go on",
                status=ExitStatus.NEEDS_PERSON,
            )
        with self.only_writer():
            pass

    def finished(self) -> bool:
        """Whether the run came to its end, by the exit reason it left."""
        try:
            return bool(parse(self.exit_file.read_bytes())["code"] == ExitStatus.DONE)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def find_run(name: str, runs: str = "runs") -> RunFolder:
    """The run that `name` means: a folder, or a name under `runs`. Raises UserError naming the runs there are."""
    for path in (Path(name), Path(runs) / name):
        if RunFolder(path).exists():
            return RunFolder(path)
    there = sorted(path.parent.name for path in Path(runs).glob("*/run.toml"))
    raise UserError(
        f"there is no run called {name!r}",
        why=f"looked for {Path(name) / 'run.toml'} and {Path(runs) / name / 'run.toml'}",
        remedy=f"runs here: {', '.join(there)}" if there else "train one first: minka train demo",
    )


class StorePlace(NamedTuple):
    """The token store a run was trained on: for those who need its tokenizer and not its tokens."""

    folder: Path
    tokenizer: Path
    eod: int


def store_of(folder: RunFolder) -> StorePlace:
    """Where a run's tokens came from, by its provenance. Raises UserError when either file is gone."""
    file = folder.path / "provenance.json"
    try:
        store = Path(parse(file.read_bytes())["data"]["store"])
        file = store / "manifest.json"
        return StorePlace(store, store / "tokenizer", int(parse(file.read_bytes())["eod"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot be read: {error}",
            where=str(file),
            why="the run's tokenizer is found through it",
            remedy="put the run's folder and its token store back where they were",
        ) from None
