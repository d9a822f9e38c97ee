"""The run folder: the files of a run, who may write there, and how a run is found by its name."""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.atomic import write_json, write_text, writing
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import parse
from minka.plan.load_config import dump_toml, load_run

LINEAGE_FORMAT = 1


class RunFolder:
    """The files of one run; docs/architecture.md lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.toml"
        self.provenance_file = path / "provenance.json"
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
        """The folder that `config` names; nothing is created."""
        return cls(Path(config.run.folder) / config.run.name)

    def exists(self) -> bool:
        """Whether a run was created here."""
        return self.config_file.is_file()

    def begun(self) -> bool:
        """Whether the run has a ledger or a checkpoint. Before that, creating it again loses nothing."""
        recorded = self.ledger_file.exists() and self.ledger_file.stat().st_size > 0
        return self.exists() and (recorded or any(self.checkpoints.glob("step-*")))

    def config(self) -> RunConfig:
        """The configuration in run.toml. Raises UserError."""
        return load_run(str(self.config_file)).config

    def lineage(self) -> list[dict[str, Any]]:
        """The checkpoints that the run came from, nearest first; empty when it began from new weights."""
        if not self.lineage_file.exists():
            return []
        try:
            return list(parse(self.lineage_file.read_bytes())["parents"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot be read: {error}", where=str(self.lineage_file), remedy="repair the file"
            ) from None

    def create(self, config: RunConfig, provenance: Mapping[str, object], lineage: Sequence[object] = ()) -> None:
        """Write the files of a run that has not begun. Raises UserError where they cannot be written here."""
        if not self.exists() and self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                "this folder is not empty, and has no run.toml",
                where=str(self.path),
                why="minka never writes into a folder that is not a run's",
                remedy="choose a different run.name or run.folder, or move these files",
            )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            write_json(self.provenance_file, provenance)
            self.lineage_file.unlink(missing_ok=True)
            if lineage:
                write_json(self.lineage_file, {"format": LINEAGE_FORMAT, "parents": list(lineage)})
            write_text(self.config_file, dump_toml(config))  # last: with it, the run exists

    def training_starts(self, config: RunConfig) -> None:
        """Make `config` the configuration of the run, and remove the exit reason of the session before."""
        with writing(self.path):
            self.exit_file.unlink(missing_ok=True)
            if self.config_file.read_text(encoding="utf-8") != dump_toml(config):
                write_text(self.config_file, dump_toml(config))

    def check_data(self, store: Path, manifest_sha256: str) -> None:
        """Raises UserError when the run began with a different token store."""
        file = self.provenance_file
        try:
            began_with = parse(file.read_bytes()).get("data", {}).get("manifest_sha256") if file.exists() else None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"cannot be read: {error}",
                where=str(file),
                why="it says which token store this run began with",
                remedy="repair the file, or start a new run (run.name=...)",
            ) from None
        if began_with != manifest_sha256:
            raise UserError(
                f"this is not the token store that the run began with (hash {str(began_with)[:8]} then, "
                f"{manifest_sha256[:8]} now)",
                where=str(store),
                why="the same token ids could mean different text",
                remedy="put the old store back, or start a new run on the new data (run.name=...)",
            )

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the lock of the one process that writes here. Raises UserError when it is held, or not allowed."""
        with ExitStack() as stack:
            with writing(self.path):
                file = stack.enter_context((self.path / ".lock").open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        "a different process is training this run",
                        where=str(self.path),
                        why="two writers would mix their checkpoints",
                        remedy="wait until it ends, or stop it (create a file called STOP in the folder)",
                    ) from None
            yield

    def check_may_start(self) -> None:
        """Raises UserError when the run's folder has a STOP file, or a different process trains the run."""
        if self.stop_file.exists():
            raise UserError(
                "a file called STOP asks this run to stop",
                where=str(self.stop_file),
                why="the run would save and stop again at once",
                remedy="delete the file to resume the run",
                status=ExitStatus.NEEDS_PERSON,
            )
        with self.only_writer():
            pass

    def finished(self) -> bool:
        """Whether the run has reached its end, according to its exit reason."""
        try:
            return bool(parse(self.exit_file.read_bytes())["code"] == ExitStatus.DONE)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def find_run(name: str, runs: str = "runs") -> RunFolder:
    """The run that `name` means: a folder, or a name under `runs`. Raises UserError listing the runs."""
    for path in (Path(name), Path(runs) / name):
        if RunFolder(path).exists():
            return RunFolder(path)
    names = sorted(path.parent.name for path in Path(runs).glob("*/run.toml"))
    raise UserError(
        f"there is no run called {name!r}",
        why=f"looked for {Path(name) / 'run.toml'} and {Path(runs) / name / 'run.toml'}",
        remedy=f"runs here: {', '.join(names)}" if names else "train one first: minka train demo",
    )


class StorePlace(NamedTuple):
    """Where a run's token store is, for commands that need its tokenizer but not its tokens."""

    folder: Path
    tokenizer: Path
    eod: int


def store_of(folder: RunFolder) -> StorePlace:
    """The token store of a run, by its provenance. Raises UserError when one of the files is missing."""
    file = folder.provenance_file
    try:
        store = Path(parse(file.read_bytes())["data"]["store"])
        file = store / "manifest.json"
        return StorePlace(store, store / "tokenizer", int(parse(file.read_bytes())["eod"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot be read: {error}",
            where=str(file),
            why="it says where the run's tokenizer is",
            remedy="put the run's folder and its token store back where they were",
        ) from None
