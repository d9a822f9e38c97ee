"""The run folder: what is on disk of a run, who may write there, and whether it is the run that is meant."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minka.plan.config import IDENTITY, RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.load import dump_toml, flatten, load_run
from minka.plan.writing import write_json, write_text, writing


class RunFolder:
    """The files of one run; see docs/architecture.md for the list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.toml"
        self.ledger_file = path / "ledger.jsonl"
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
        """Whether a run was begun here."""
        return self.config_file.is_file()

    def config(self) -> RunConfig:
        """The run as it was last started."""
        return load_run(str(self.config_file)).config

    def open(self, config: RunConfig, provenance: Mapping[str, object]) -> None:
        """Create the folder, or check that the run in it is the one `config` describes.

        Raises UserError when another configuration has this name, and when the disk is full or may not be written.
        """
        if self.exists():
            self.check_same(config)
            self._check_data(provenance)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                "this folder is not empty and holds no run.toml",
                where=str(self.path),
                why="a run never writes into somebody else's folder",
                remedy="choose another run.name or run.folder, or move what is there",
            )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            if not (self.path / "provenance.json").exists():
                write_json(self.path / "provenance.json", provenance)
            write_text(self.config_file, dump_toml(config))  # last: with it, the run exists

    def _check_data(self, provenance: Mapping[str, Any]) -> None:
        file = self.path / "provenance.json"
        began = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        old, new = (p.get("data", {}).get("manifest_sha256") for p in (began, provenance))
        if old != new:
            raise UserError(
                f"the token store is not the one this run began with (hash {str(old)[:8]} then, {str(new)[:8]} now)",
                where=str(provenance.get("data", {}).get("store", self.path)),
                why="the same ids could mean other text, and the run would go on without a word",
                remedy="put the old store back, or give the new data a run of their own (run.name=...)",
            )

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Held by the one process that writes here. Raises UserError while another one does."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
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
            return bool(json.loads(self.exit_file.read_text(encoding="utf-8"))["code"] == ExitStatus.DONE)
        except (OSError, ValueError, KeyError):
            return False

    def check_same(self, config: RunConfig) -> None:
        """Raises UserError naming each value in which the run here and `config` are different runs."""
        old, new = (flatten(c.model_dump(mode="json", include=set(IDENTITY))) for c in (self.config(), config))
        differ = [k for k in sorted(old.keys() | new.keys()) if k != "run.folder" and old.get(k) != new.get(k)]
        if differ:
            lines = "; ".join(f"{key} is {old.get(key)!r} there and {new.get(key)!r} here" for key in differ)
            raise UserError(
                f"a run called {config.run.name!r} exists with another configuration: {lines}",
                where=str(self.path),
                why="going on would mix two runs under one name",
                remedy=f"give the new one a name (run.name=...), or drop the overrides to go on with the old one "
                f"(minka train {self.path})",
            )


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
        store = Path(json.loads(file.read_text(encoding="utf-8"))["data"]["store"])
        file = store / "manifest.json"
        return StorePlace(store, store / "tokenizer", int(json.loads(file.read_text(encoding="utf-8"))["eod"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot be read: {error}",
            where=str(file),
            why="the run's tokenizer is found through it",
            remedy="put the run's folder and its token store back where they were",
        ) from None
