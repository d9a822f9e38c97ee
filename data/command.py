"""`minka data`: prepare, inspect and verify token stores."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minka.plan.cli import new_app, print_json, print_table, progress, run_app
from minka.plan.errors import UserError, visible

if TYPE_CHECKING:
    from minka.data.token_store import Split, TokenStore
    from minka.plan.config import RunConfig

RUN_HELP = "a recipe, a run.toml, a run folder or the name of a run"
Run = Annotated[str, typer.Argument(help=RUN_HELP)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, any number")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
SHOWN_CHARACTERS = 2_000


def main(argv: Sequence[str]) -> int:
    """Run `minka data ...`; returns the exit status."""
    app = new_app("Turn documents into tokens that can be traced back.")
    app.command("prepare")(_prepare)
    app.command("inspect")(_inspect)
    app.command("verify")(_verify)
    return run_app(app, argv, "minka data")


def _prepare(run: Run, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read a run's corpus, split it, make its tokenizer, and write its token store."""
    from minka.data.prepare import open_or_prepare, store_folder
    from minka.plan.load_config import load_run
    from minka.plan.store_files import MANIFEST

    config = load_run(run, overrides or ()).config
    existed = (store_folder(config, Path()) / MANIFEST).is_file()
    store = open_or_prepare(config, Path(), progress)
    title = f"{store.folder} {'exists already' if existed else 'is prepared'}"
    _show(_describe_store(store) | {"prepared": not existed}, as_json, title)


def _inspect(
    where: Annotated[str, typer.Argument(help=f"a token store, or {RUN_HELP}")],
    overrides: Overrides = None,
    document: Annotated[int | None, typer.Option(help="show this document, counted from 0")] = None,
    sample: Annotated[
        int | None, typer.Option(help="show the documents of this sample, a position in the run's order (needs a run)")
    ] = None,
    split: Annotated[str, typer.Option(help="of --document: train (the default) or validation")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the contents of a store, one of its documents, or the documents that a sample of a run was cut from."""
    from minka.data.prepare import check_store
    from minka.data.token_store import TokenStore
    from minka.plan.store_files import check_store_files

    folder, config = _find(where, overrides or ())
    store = TokenStore.open(folder)
    if config is not None:
        check_store(store, config)
    if document is not None and sample is not None:
        raise UserError("give --document or --sample, not both")
    if split and document is None:
        raise UserError("it needs --document", where="--split", why="samples come from train", remedy="leave it out")
    if document is not None or sample is not None:
        name = store.split(split or "train").name
        for part in ("idx", "parquet"):  # not the tokens, which may take hours
            check_store_files(folder, f"{name}.{part}")
    if document is not None:
        found = _document(store, split or "train", document)
    elif sample is not None:
        found = _trace_sample(store.split("train"), config, sample, where)
    else:
        found = _describe_store(store)
    _show(found, as_json)


def _verify(
    store: Annotated[str, typer.Argument(help=f"a token store, or {RUN_HELP}")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of a store again, and compare tokens, index, sidecar and manifest with each other."""
    from minka.data.store_manifest import read_manifest
    from minka.data.verify import verify

    folder, _ = _find(store, overrides or ())
    size = sum(file.bytes for file in read_manifest(folder).files.values())
    with progress(size, "verifying", "bytes") as advance:
        checked = verify(folder, advance)
    _show(checked, as_json, f"{folder} is intact: every file has its hash, and tokens, index and sidecar agree")


def _find(where: str, overrides: Sequence[str]) -> "tuple[Path, RunConfig | None]":
    """The folder of a store, and the run that it was asked for by."""
    from minka.data.prepare import store_folder
    from minka.plan.load_config import load_run
    from minka.plan.run_folder import RunFolder
    from minka.plan.store_files import MANIFEST, sha256_of

    path = Path(where)
    if path.is_dir() and ((path / MANIFEST).exists() or not (path / "run.toml").exists()):
        if overrides:
            raise UserError("overrides apply to a run", where=where, why="this is a folder of tokens, not a run")
        return path, None
    config = load_run(where, overrides).config
    folder = store_folder(config, Path())
    if (path / "run.toml").is_file() and (folder / MANIFEST).is_file() and not overrides:
        RunFolder(path).check_data(folder, sha256_of(folder / MANIFEST))
    return folder, config


def _describe_store(store: "TokenStore") -> dict[str, Any]:
    manifest = store.manifest
    facts: dict[str, Any] = {
        "store": str(store.folder),
        "hash": store.hash,
        "source": {key: value for key, value in manifest.source.items() if value},
        "tokenizer": manifest.tokenizer.name,
        "vocab": manifest.vocab,
        "eod": manifest.eod,
        "left_out_empty": manifest.empty,
    }
    for name, part in manifest.splits.items():
        facts[name] = {**part.model_dump(), "bytes_per_token": round(part.bytes / (part.tokens - part.documents), 4)}
    bad = {"first_bad_rows": list(manifest.skipped.first)} if manifest.skipped else {}
    return facts | bad | ({"note": "; ".join(manifest.notes)} if manifest.notes else {})


def _document(store: "TokenStore", split: str, number: int) -> dict[str, Any]:
    from minka.data.document import content_hash
    from minka.plan.store_files import damaged_store

    chosen = store.split(split)
    text, row = chosen.text_of(number), chosen.provenance(number)
    if store.manifest.exact and content_hash(text.encode()).hex() != row["hash"]:
        raise damaged_store(store.folder, f"{split}.bin: document {number} is not the text that was stored")
    return {"document": number, "split": split, **row, "text": text}


def _trace_sample(split: "Split", config: "RunConfig | None", position: int, where: str) -> dict[str, Any]:
    from minka.data.sample_order import SampleOrder, window_count

    if config is None:
        remedy = f"give the run: minka data inspect RUN --sample {position}"
        raise UserError("a sample is a position in a run's order, and this is a store", where=where, remedy=remedy)
    if position < 0:
        raise UserError(f"there is no sample {position}", remedy="samples are counted from 0, through all epochs")
    windows = window_count(split.n_tokens, config.data.seq_len)
    window = int(SampleOrder(windows, config.run.seed).windows_at([position])[0])
    return {
        "sample": position,
        "epoch": position // windows,
        "window": window,
        "dropped": any(first <= position < last for first, last in config.data.dropped_samples),
        "pieces": split.trace_window(window, config.data.seq_len),
    }


def _show(facts: dict[str, Any], as_json: bool, title: str = "") -> None:
    if as_json:
        return print_json(facts)
    pieces, text = facts.pop("pieces", ()), facts.pop("text", "")
    print_table([(key, _in_words(value)) for key, value in facts.items()], title=title)
    if pieces:
        print_table([[_in_words(value) for value in piece.values()] for piece in pieces], list(pieces[0]))
    if text:
        print(visible(text[:SHOWN_CHARACTERS], keep="\n\t") + ("..." if len(text) > SHOWN_CHARACTERS else ""))


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(inner)}" for name, inner in value.items() if inner not in ("", None))
    if isinstance(value, list):
        return "; ".join(map(_in_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
