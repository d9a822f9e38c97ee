"""The run folder: the files of a run, who may write there, and how a run is found by its name."""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from minka.plan.atomic import delete_leftovers, write_json, write_text, writing
from minka.plan.config import RunConfig
from minka.plan.errors import ExitStatus, UserError
from minka.plan.ledger import parse_json
from minka.plan.load_config import check_means_run, dump_toml, load_run, run_names
from minka.plan.read_file import MALFORMED, reading
from minka.plan.store_files import MANIFEST, sha256_of

EXPORT_MARKER = "minka_export.json"  # in an export, and in no other folder: it names the checkpoint
CREATED = r"run\.toml|provenance\.json|lineage\.json"  # written when a run is created, run.toml last
RANK_LOG = re.compile(r"(rank|stacks|samples)-\d+\..*")
# What may be in a run's folder before the run: what a start that was cut off wrote, and what a person or a job script
# puts there (the logs of torchrun, the output of Slurm).
BEFORE_A_RUN = re.compile(
    rf"{CREATED}|\.({CREATED})\..+|logs|leases|\.lock|STOP|slurm-.*|.*\.(out|err|log|sh|sbatch)|\.nfs.*|\.DS_Store"
)


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
        self.tensorboard = self.logs / "tensorboard"
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
        return self.exists() and (self.ledger_bytes() > 0 or any(self.checkpoints.glob("step-*")))

    def ledger_bytes(self) -> int:
        """The size of the ledger; 0 where there is none."""
        return self.ledger_file.stat().st_size if self.ledger_file.exists() else 0

    def config(self) -> RunConfig:
        """The configuration in run.toml. Raises UserError."""
        return load_run(str(self.config_file)).config

    def lineage(self) -> list[dict[str, Any]]:
        """The checkpoints that the run came from, nearest first; empty when it began from new weights."""
        if not self.lineage_file.exists():
            return []
        with reading(self.lineage_file, "", *MALFORMED, remedy="repair the file"):
            parents = list(parse_json(self.lineage_file.read_bytes())["parents"])
        return parents

    def run_id(self) -> str:
        """What tells this run from every other, wherever it is moved; empty for one of an older version."""
        return str(self.provenance().get("id", ""))

    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; empty where it cannot be read."""
        with suppress(OSError, *MALFORMED):
            return dict(parse_json(self.provenance_file.read_bytes()))
        return {}

    def parent_folders(self, parents: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Where the folders of `parents` (of a lineage) are: moved together with their child, or where they were."""
        places, child = [], self.path.resolve()
        for parent in parents:
            moved = Path(os.path.normpath(child / str(parent.get("relative") or "/")))
            child = moved if "relative" in parent and moved.is_dir() else Path(str(parent["folder"]))
            places.append(child)
        return places

    def bases(self, current: Path = Path()) -> list[Path]:
        """Folders that relative paths of the configuration may start from, in the order to try them.

        A run that was created records the folder that it was started in: relative to its own, so that both can be
        moved together, and absolute. Other runs have the `current` one.
        """
        recorded = self.provenance().get("base")
        if not isinstance(recorded, dict):
            return [current]
        moved = Path(os.path.normpath(self.path.resolve() / str(recorded.get("relative"))))
        found = [path for path in (moved, Path(str(recorded.get("absolute")))) if path.is_dir()]
        here = current.resolve()
        return list(dict.fromkeys([*(current if path == here else path for path in found), current]))

    def find_store(self, name: Path, current: Path = Path()) -> Path:
        """The run's token store, which its configuration calls `name`; where there is none yet, its place.

        Of several, it is the one whose manifest the run has recorded: a different project may have one of this name.
        """
        data = self.provenance().get("data")
        recorded = data if isinstance(data, dict) else {}
        was, sha256 = recorded.get("store"), recorded.get("manifest_sha256")
        places = [*(base / name for base in self.bases(current)), *([Path(was)] if isinstance(was, str) else [])]
        found = [place for place in places if (place / MANIFEST).is_file()]
        for place in found:
            with suppress(OSError):  # its reader says why it cannot be read
                if sha256_of(place / MANIFEST) == sha256:
                    return place
        return (found or places)[0]

    def check_free(self) -> None:
        """Raises UserError when this is not a run's folder, and holds what no run to come would have in it."""
        if self.exists() or not self.path.exists():
            return
        with reading(self.path, remedy="choose a different run.name or run.folder"):
            others = sorted(path.name for path in self.path.iterdir() if not self._may_precede(path))
        if others:
            what = (
                f"this folder is not empty, and is not a run's: it has no run.toml, and holds {', '.join(others[:5])}"
            )
            remedy = "choose a different run.name or run.folder, or move these files"
            raise UserError(what, where=str(self.path), remedy=remedy)

    def _may_precede(self, path: Path) -> bool:
        if path == self.ledger_file:
            return not self.ledger_bytes()
        if path == self.checkpoints:
            return path.is_dir() and all(inside.name.startswith(".") for inside in path.iterdir())
        return bool(BEFORE_A_RUN.fullmatch(path.name))

    def create(self, config: RunConfig, provenance: Mapping[str, object], lineage: Sequence[object] = ()) -> None:
        """Write the files of a run that has not begun, for its one writer. A cut-off creation is done again.

        Raises UserError where they cannot be written here.
        """
        self.check_free()
        self.make()
        with writing(self.path):
            for path in self.path.iterdir():
                if re.fullmatch(rf"\.({CREATED})\..+", path.name):  # half written
                    path.unlink(missing_ok=True)
            write_json(self.provenance_file, provenance)
            self.lineage_file.unlink(missing_ok=True)
            if lineage:
                write_json(self.lineage_file, {"format": 1, "parents": list(lineage)})
            write_text(self.config_file, dump_toml(config))  # last: with it, the run exists

    def make(self) -> None:
        """Make the folder itself, and its logs/, where they are missing. Raises UserError."""
        with writing(self.path):
            self.logs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def discarded_if_refused(self) -> Iterator[None]:
        """Where the block refuses a run that has not begun, delete what it has created; for the run's one writer."""
        before = self._contents()
        try:
            yield
        except (UserError, SystemExit) as error:  # SystemExit: a different rank has refused it
            status = error.status if isinstance(error, UserError) else error.code
            if status == ExitStatus.REFUSED and not self.begun():
                logs = {path for path in self.logs.glob("*") if RANK_LOG.fullmatch(path.name)}  # begun before the lock
                for path in (*(self._contents() - before), *logs, self.path / ".lock"):  # `only_writer` copes with that
                    path.unlink(missing_ok=True)
                for folder in (self.checkpoints, self.path / "leases", self.logs, self.path):
                    with suppress(OSError):  # not empty, or a link
                        folder.rmdir()
            raise

    def _contents(self) -> set[Path]:
        """Its files and links, and those in logs/."""
        found = (*self.path.glob("*"), *self.logs.glob("*"))
        return {path for path in found if path.is_symlink() or not path.is_dir()}

    def delete_leftovers(self) -> None:
        """Delete what killed processes of this host have left half written; for the run's one writer."""
        for folder in (self.path, self.path / "leases", *self.evals.glob("*")):
            delete_leftovers(folder)

    def training_starts(self, config: RunConfig) -> None:
        """Make `config` the configuration of the run, and remove the exit reason of the session before."""
        with writing(self.path):
            self.exit_file.unlink(missing_ok=True)
            if self.config_file.read_text(encoding="utf-8") != dump_toml(config):
                write_text(self.config_file, dump_toml(config))

    def check_data(self, store: Path, manifest_sha256: str) -> None:
        """Raises UserError when the run began with a different token store."""
        with reading(
            self.provenance_file,
            "",
            *MALFORMED,
            remedy="repair the file, which names the run's token store, or start a new run (run.name=...)",
        ):
            began_with = parse_json(self.provenance_file.read_bytes()).get("data", {}).get("manifest_sha256")
        if began_with != manifest_sha256:
            hashes = f"hash {str(began_with)[:8]} then, {manifest_sha256[:8]} now"
            what = f"this is not the token store that the run began with ({hashes})"
            remedy = "put the old store back, or start a new run on the new data (run.name=...)"
            why = "the same token ids could mean different text"
            raise UserError(what, where=str(store), why=why, remedy=remedy)

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Hold the lock of the one process that writes here. Raises UserError when it is held, or not allowed."""
        with ExitStack() as stack:
            with writing(self.path):
                while True:
                    file = stack.enter_context((self.path / ".lock").open("a"))
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        remedy = "wait until it ends, or stop it (create a file called STOP in the folder)"
                        what = "a different process is training this run"
                        raise UserError(what, where=str(self.path), remedy=remedy) from None
                    with suppress(FileNotFoundError):  # deleted by the writer before, whose run was refused
                        if os.path.samestat(os.fstat(file.fileno()), (self.path / ".lock").stat()):
                            break
            yield

    def check_may_start(self) -> None:
        """Raises UserError when the run's folder has a STOP file, or a different process trains the run."""
        if self.stop_file.exists():
            what, remedy = "a file called STOP asks this run to stop", "delete the file to resume the run"
            raise UserError(what, where=str(self.stop_file), remedy=remedy, status=ExitStatus.NEEDS_PERSON)
        with self.only_writer():
            pass

    def finished(self) -> bool:
        """Whether the run has reached its end, according to its exit reason."""
        try:
            ending = parse_json(self.exit_file.read_bytes())
            return bool(ending["code"] == ExitStatus.DONE or ending.get("finished") is True)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def is_exported(self, checkpoint: str, sha256: str) -> bool:
        """Whether export/ is of the checkpoint of this name and hash. It appears by one rename, so it is whole."""
        try:
            marker = parse_json((self.export / EXPORT_MARKER).read_bytes())
            # Earlier versions noted no hash.
            return Path(marker["source"]).name == checkpoint and marker.get("sha256", sha256) == sha256
        except (OSError, *MALFORMED):
            return False


def find_run(name: str, runs: str = "runs") -> RunFolder:
    """The run that `name` means: a folder, or a name under `runs`. Raises UserError listing the runs."""
    for path in (Path(name), Path(runs) / name):
        if RunFolder(path).exists():
            return RunFolder(path)
    check_means_run(name)
    names = run_names(runs)
    why = f"looked for {Path(name) / 'run.toml'} and {Path(runs) / name / 'run.toml'}"
    remedy = f"runs here: {', '.join(names)}" if names else "train one first: minka train demo"
    raise UserError(f"there is no run called {name!r}", why=why, remedy=remedy)


class StorePlace(NamedTuple):
    """Where a run's token store is, for commands that need its tokenizer but not its tokens."""

    folder: Path
    tokenizer: Path
    eod: int


def store_of(folder: RunFolder) -> StorePlace:
    """The token store that the run began with. Raises UserError when it is a different one, or a file is missing."""
    remedy = "put the run's folder and its token store, which has its tokenizer, back where they were"
    with reading(folder.provenance_file, "", *MALFORMED, remedy=remedy):
        was = Path(parse_json(folder.provenance_file.read_bytes())["data"]["store"])
    named = folder.config().data.store
    store = folder.find_store(Path(named).expanduser() if named else Path(was.parent.name, was.name))
    remedy += f", or a link to a store that was moved alone: ln -s ITS_FOLDER {quote(str(store))}"
    with reading(store / MANIFEST, "", *MALFORMED, remedy=remedy):
        eod = int(parse_json((store / MANIFEST).read_bytes())["eod"])
        folder.check_data(store, sha256_of(store / MANIFEST))
    return StorePlace(store, store / "tokenizer", eod)
