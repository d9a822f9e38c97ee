"""The parent of a run: the checkpoint of a different run, or the Hugging Face folder, that it starts from.

It is found once, when the run is created, and recorded in lineage.json with its step and hash, so that a run that ended
before its own first checkpoint begins from the very same weights again.
"""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from minka.checkpoint.catalogue import find_checkpoint, run_and_step
from minka.checkpoint.commit import step_name
from minka.checkpoint.manifest import read_header
from minka.data.prepare import open_or_prepare, store_folder
from minka.data.token_store import TokenStore
from minka.data.tokenizer import bytes_tokenizer, load_hf
from minka.plan.checkpoint_disk import claim_place, find_place, link_place
from minka.plan.cli import progress
from minka.plan.config import RunConfig
from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError
from minka.plan.hub_config import read_config
from minka.plan.ledger import parse_json
from minka.plan.read_file import MALFORMED, reading
from minka.plan.resume_rules import Changes, changes, check_batch, check_fork, model_changes
from minka.plan.run_folder import RunFolder, find_run, store_of
from minka.plan.run_state import Position
from minka.plan.store_files import MANIFEST, check_store_files, sha256_of
from minka.train.provenance import provenance

OWN = ("run.name", "run.folder", "run.start_from", "run.start_with")  # differ in every fork


class Parent(NamedTuple):
    """A checkpoint that a run starts from; `checkpoint` and `config` are None for a Hugging Face folder."""

    run: str
    folder: Path
    checkpoint: Path | None
    config: RunConfig | None
    model: ModelSection
    position: Position
    data_sha256: str
    sha256: str
    learning_rate: float | None = None  # of its next step; None in format 1

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.run} at step {self.position.step}" if self.run else str(self.folder)


def open_run(config: RunConfig, given: Collection[str] = ()) -> None:
    """Prepare the run's token store if it is missing, and check that the run can begin or resume. Raises UserError."""
    folder = RunFolder.of(config)
    if folder.begun():
        store = open_or_prepare(config, Path(), progress)
        folder.check_data(store.folder, store.hash)
    else:
        folder.check_free()
        find_place(config)
        parent = find_parent(config)
        if parent:
            check_parent(parent, config, given)
        open_or_prepare(config, Path(), progress)
        if parent:
            check_tokenizer(parent, config)  # the run's own may just have been trained
    folder.make()


def create_run(config: RunConfig, command: Sequence[str]) -> None:
    """Write the files of a run that has not begun; for the folder's one writer, after `open_run`. Raises UserError."""
    parent, store = find_parent(config), TokenStore.open(store_folder(config, Path()))
    lineage = lineage_of(parent, config) if parent else ()
    link_place(config, claim_place(config))
    RunFolder.of(config).create(config, provenance(config, store, command), lineage)


def find_parent(config: RunConfig) -> Parent | None:
    """The parent that run.start_from names now; None when it is empty. Raises UserError."""
    given, ours = config.run.start_from, RunFolder.of(config)
    if not given:
        return None
    places = [base / Path(given).expanduser() for base in ours.bases()]
    given = next((str(place) for place in places if Path(run_and_step(str(place))[0]).is_dir()), given)
    if (Path(given) / "config.json").is_file() and not (Path(given) / "run.toml").is_file():
        return _hub_folder(Path(given))
    name, step = run_and_step(given)
    try:
        found = find_run(name, config.run.folder)
    except UserError as error:
        what = f"{config.run.start_from!r} is neither a run nor a Hugging Face folder"
        raise UserError(what, where="run.start_from", why=error.why) from None
    if found.path.resolve() == ours.path.resolve():
        old = f"minka train {quote(str(found.path))}"
        remedy = f"give the new run a name (run.name=NEW), or leave it out to resume ({old})"
        raise UserError("a run cannot start from itself", where="run.start_from", remedy=remedy)
    return _checkpoint(found, find_checkpoint(found.checkpoints, step))


def pinned_parent(folder: RunFolder) -> Parent | None:
    """The parent that lineage.json names; None for a run without one. Raises UserError when it has changed."""
    lineage = folder.lineage()
    if not lineage:
        return None
    pin, path = lineage[0], folder.parent_folders(lineage)[0]
    if not pin["run"]:
        return _hub_folder(path)._replace(sha256=pin["sha256"])
    checkpoint = path / "checkpoints" / step_name(pin["step"])
    parent = _checkpoint(RunFolder(path), checkpoint) if checkpoint.exists() else None
    if parent is None or parent.sha256 != pin["sha256"]:
        raise UserError(
            f"the checkpoint that this run starts from {'is gone' if parent is None else 'has changed'}",
            where=str(checkpoint),
            why="the run has no checkpoint of its own yet, and different weights would make it a different run",
            remedy="start a run of a different name (run.name=...) from an existing checkpoint",
        )
    return parent


def check_parent(parent: Parent, config: RunConfig, given: Collection[str] = ()) -> None:
    """Raises UserError naming what keeps the run from starting from `parent`. `given` are the keys the user gave."""
    entire = config.run.start_with == "all"
    if entire and parent.config is None:
        what = "a Hugging Face folder has weights only: no optimizer, counters or data position"
        raise UserError(what, where="run.start_with", remedy='set run.start_with="weights"')
    check_fork(changes_of(parent, config), parent.name, given)
    if not entire or parent.config is None:
        return
    run, (step, _, tokens) = config.run, parent.position
    if config.finished(step, tokens):
        end = f"max_steps={run.max_steps}" if run.max_steps is not None else f"max_tokens={run.max_tokens}"
        what = f"the run begins at {parent.name} ({tokens} tokens), and run.{end} ends it there or earlier"
        remedy = 'give a greater length, an earlier checkpoint, or run.start_with="weights", which counts from 0'
        raise UserError(what, where="run.start_from", remedy=remedy)
    check_batch(parent.config, config, step, tokens)


def check_tokenizer(parent: Parent, config: RunConfig) -> None:
    """Raises UserError when the parent's token ids mean different text than those of the run's token store."""
    folder = parent.folder
    if parent.checkpoint:
        store = store_of(RunFolder(parent.folder))
        check_store_files(store.folder, "tokenizer/")
        folder = store.tokenizer
    file = folder / "tokenizer.json"
    remedy = f"it says what token ids mean to {parent.name}: put it back (AutoTokenizer's save_pretrained writes one)"
    with reading(file, "", *MALFORMED, remedy=remedy):
        theirs = _meaning(file.read_text(encoding="utf-8"))
    ours = _tokenizer(config)
    if ours is None or _meaning(ours) != theirs:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer of {parent.name}",
            where="run.start_from",
            why="its token ids mean different text than those that the weights were trained on",
            remedy=f"give data.store= data.tokenizer={folder} to prepare the data with the parent's",
        )


def changes_of(parent: Parent, config: RunConfig) -> Changes:
    """The settings in which a run differs from its parent, without its name and folder."""
    if parent.config is None:
        return model_changes(parent.model, config.model)
    return {key: pair for key, pair in changes(parent.config, config).items() if key not in OWN}


def lineage_of(parent: Parent, config: RunConfig) -> list[dict[str, Any]]:
    """The run's parents, nearest first, as lineage.json has them."""
    folder = parent.folder.resolve()
    entry = {
        "run": parent.run,
        "folder": str(folder),
        "relative": os.path.relpath(folder, RunFolder.of(config).path.resolve()),  # to the run that starts from it
        "step": parent.position.step,
        "tokens": parent.position.tokens,
        "sha256": parent.sha256 or hash_hub_folder(parent.folder),
        "with": config.run.start_with,
        "changed": changes_of(parent, config),
    }
    return [entry, *(RunFolder(parent.folder).lineage() if parent.run else [])]


def begins_at(parent: Parent, config: RunConfig, data_sha256: str) -> tuple[Position, str]:
    """Where a run begins, and a line that says what it takes from its parent."""
    origin = f"starts from {parent.name}"
    if config.run.start_with == "weights" or parent.config is None:
        return Position(), f"{origin} (weights only; optimizer, schedule and data begin at 0)"
    old, new = parent.config, config
    same = {
        "the token store": parent.data_sha256 == data_sha256,
        "data.seq_len": old.data.seq_len == new.data.seq_len,
        "run.seed": old.run.seed == new.run.seed,
        "data.dropped_samples": old.data.dropped_samples == new.data.dropped_samples,
    }
    different = [name for name, is_same in same.items() if not is_same]
    if not different:
        return parent.position, f"{origin} (weights, optimizer, position)"
    return parent.position._replace(samples=0), (
        f"{origin} (weights, optimizer, counters); the data begin at the first sample of a new order, "
        f"because {' and '.join(different)} {'differs' if len(different) == 1 else 'differ'}"
    )


def hash_hub_folder(folder: Path) -> str:
    """sha256 over config.json and the hashes of all weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def _checkpoint(run: RunFolder, path: Path) -> Parent:
    with reading(path, "", *MALFORMED, remedy="use a different checkpoint (RUN@STEP)"):
        header = read_header(path)
        state, at = header.state, Position.of(header.state)
        config = RunConfig.model_validate_json(json.dumps(state["config"])) if "config" in state else run.config()
        began = parse_json(run.provenance_file.read_bytes()) if run.provenance_file.exists() else {}
        data = state.get("data_sha256") or began.get("data", {}).get("manifest_sha256", "")
    name, rate = run.path.resolve().name, state.get("learning_rate")
    return Parent(name, run.path, path, config, config.model, at, data, header.sha256, rate)


def _hub_folder(folder: Path) -> Parent:
    return Parent("", folder, None, None, read_config(folder), Position(), "", "")


def _tokenizer(config: RunConfig) -> str | None:
    """The tokenizer.json of the run's data; None where it is still to be trained, and so will differ."""
    store, name = store_folder(config, Path()), config.data.tokenizer
    if (store / MANIFEST).is_file():
        check_store_files(store, "tokenizer/")
        return (store / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    if name == "bpe":
        return None
    made = bytes_tokenizer() if name == "bytes" else load_hf(name, config.model.vocab)
    return made.backend.to_str()


def _meaning(tokenizer: str) -> str:
    """Hash of the parts that map text to ids; the other parts change when a tokenizer is loaded and saved again."""
    parts = json.loads(tokenizer)
    kept = {key: parts.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
